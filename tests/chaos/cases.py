"""The matrix: what goes wrong, when, among how many ranks, in which of the library's ways to communicate."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "fault": (
        "kill",  # SIGKILL
        "stop",  # SIGSTOP; SIGCONT when the survivors have ended
        "exit",  # sys.exit(0), raised by a signal handler
        "os_exit",  # os._exit(0), by another thread
        "exception",  # raised by a signal handler, and not caught
        "out_of_memory",  # SIGKILL of a large process and all its children, as the kernel does to a control group
        "allocation",  # a resource limit makes shared memory fail
    ),
    "moment": (
        "before_first",  # collective
        "waiting_for_peers",  # in a collective that one rank has not called yet
        "in_reduction",  # its own shard half reduced
        "waiting_for_end",  # its own shard done, that of another not
        "between_buckets",  # of a backward: one submitted, others to come
        "in_close",  # close() waits for a collective in flight
    ),
    "size": (2, 4),
    "surface": ("communicator", "step", "eager", "ddp"),
    "workers": (0, 2),  # forked DataLoader workers of each rank
}

FAULT_ITERATION = 2  # DDP has rebuilt its buckets by then
BUCKETS = 2  # of an iteration, at least; a fault may strike at any of them but the last
PATIENT_S, IMPATIENT_S = 10.0, 1.5


@dataclass(frozen=True)
class Case:
    fault: str
    moment: str
    size: int
    surface: str
    workers: int
    seed: int = 0

    def __str__(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())

    @staticmethod
    def named(name: str) -> Case:
        """The inverse of str()."""
        return Case(*(int(word) if word.isdigit() else word for word in name.split("-")))

    def _draw(self, what: str, options: Sequence[Any]) -> Any:
        """One of ``options``, by the seed; each ``what`` independently of the others."""
        return random.Random(f"{self}/{what}").choice(options)

    @property
    def victim(self) -> int:
        return self._draw("victim", range(self.size))

    @property
    def other(self) -> int:
        """The rank that comes late, or holds its reduction, so that the victim has something to wait for."""
        return self._draw("other", [r for r in range(self.size) if r != self.victim])

    @property
    def bucket(self) -> int:
        """At which the fault strikes."""
        return self._draw("bucket", range(BUCKETS))

    @property
    def is_symmetric(self) -> bool:
        """Of the communicator's tensors; the aggregators' are, DDP's are not."""
        return self._draw("symmetric", (False, True))

    @property
    def is_async(self) -> bool:
        """Whether the main thread is free while the communicator works, as it must be to close it, or for Python to
        raise something in the middle of a reduction."""
        return (
            self.surface != "communicator"
            or self.moment == "in_close"
            or (self.moment == "in_reduction" and self.raises)
            or self._draw("async", (False, True))
        )

    @property
    def set_to_none(self) -> bool:
        return self._draw("zero_grad", (False, True))

    @property
    def survivors_wait(self) -> bool:
        """Before the first collective: whether the others are waiting in it already, or come when all is over."""
        return self._draw("survivors wait", (False, True))

    @property
    def ends_at_once(self) -> bool:
        """Survivors; else the interpreter shuts down, which costs each half a second of CPU for PyTorch's part."""
        return self._draw("ends at once", (False, True))

    @property
    def limit(self) -> str:
        """Which resource limit makes the victim's allocation fail. Only the first rank reserves memory, which the limit
        of file sizes concerns; in init() a limit of descriptors would hit the rendezvous before."""
        limits = ["address_space"]
        limits += ["file_size"] if self.victim == 0 else []
        limits += ["descriptors"] if self.moment != "before_first" else []
        return self._draw("limit", limits)

    @property
    def raises(self) -> bool:
        """Whether the fault is an exception of Python's, that unwinds the victim's stack."""
        return self.fault in ("exit", "exception")

    @property
    def timeout_s(self) -> float:
        return IMPATIENT_S if self.fault == "stop" else PATIENT_S


SENSELESS: tuple[tuple[str, Callable[[Case], bool]], ...] = (
    (
        "shared memory is allocated in init() (here: before_first), by symmetric_empty() and by the aggregator's "
        "constructor (waiting_for_peers), and at no other moment",
        lambda c: c.fault == "allocation" and c.moment not in ("before_first", "waiting_for_peers"),
    ),
    (
        "the DDP hook allocates no shared memory of its own",
        lambda c: c.fault == "allocation" and c.surface == "ddp" and c.moment != "before_first",
    ),
    (
        "close() runs no Python: what a signal handler raises comes after it",
        lambda c: c.raises and c.moment == "in_close",
    ),
)


def matrix(seed: int = 0) -> Iterator[Case]:
    for values in itertools.product(*DIMENSIONS.values()):
        case = Case(*values, seed=seed)
        if not any(is_senseless(case) for _, is_senseless in SENSELESS):
            yield case


def pairwise(seed: int = 0) -> list[Case]:
    """Cases of the matrix in which each pair of values of two dimensions that it has occurs at least once: greedily the
    one with the most pairs that are still missing."""
    pairs = {case: _pairs_of(case) for case in matrix(seed)}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        best = max(pairs, key=lambda case: len(pairs[case] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return chosen


def _pairs_of(case: Case) -> set[tuple[Any, Any]]:
    return set(itertools.combinations([(name, getattr(case, name)) for name in DIMENSIONS], 2))
