"""How much communication was hidden, told twice: by each backend's event record, and by ablation, which no trace fakes.

    python -m benchmarks.overlap --models resnet50 vgg11 --steps 50

Definitions (all times in seconds of one step, from the start of forward to the end of the update, zeroing included):

    M         union over buckets of [hand-over or start of the collective, result usable]
    C         union of forward, backward and update, without the wait for communication at the end of backward
    exposed, by trace       |M minus C|
    overlap ratio           |M and C| / |M|
    T_full, T_nocomm        the step, and the same step with the all-reduce replaced by nothing
    T_comm                  the same buckets all-reduced one after the other, no compute
    exposed, by ablation    T_full - T_nocomm
    hidden fraction         1 - exposed by ablation / T_comm
    compute slowdown        |C| of the full step / |C| without communication

The step is |C| + |M minus C| + idle, so by ablation the exposed time is that of the trace, plus how much slower compute
is beside communication (the same cores, the same memory), plus the difference in idle time, minus what is exposed even
without communication (an eager update beyond backward): what a trace of communication cannot see. These parts are
printed where trace and ablation differ by more than 10 %; they add up, because all times are means, over the ranks and
over the steps of all blocks but those two whose exposed time by ablation is the largest and the smallest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

import pyallreduce as par
from benchmarks import training
from benchmarks.harness import HERE, Block, Book, Samples, interleave, markdown
from benchmarks.peers import RankSet
from benchmarks.rank import Rank
from benchmarks.training import MODELS, Trainer, Way
from pyallreduce.report import Interval, intersection, length, union

BACKENDS = ("DDP (gloo)", "DDP + our hook", "aggregator, step", "aggregator, eager")
VARIANTS = ("full", "no communication", "communication only")
AGREE = 0.1
SETTLE = 3  # steps until DDP has made its final buckets


# --- in the ranks' processes -----------------------------------------------------------------------------------------

Collective = Callable[[dist.GradBucket], Future[Any]]


def _gloo(rank: Rank) -> Collective:
    world = dist.group.WORLD
    assert world is not None
    return lambda bucket: default_hooks.allreduce_hook(world, bucket)


def _ours(rank: Rank) -> Collective:
    return lambda bucket: par.allreduce_hook(rank.comm, bucket)


def _nothing(rank: Rank) -> Collective:
    return lambda bucket: training.done_at_once(None, bucket)


@dataclass
class StepTimes:
    """What one rank's record says about one step."""

    wall_s: float
    compute_s: float
    comm_s: float
    exposed_s: float

    @property
    def idle_s(self) -> float:
        return self.wall_s - self.compute_s - self.exposed_s


def _mean(times: list[StepTimes]) -> StepTimes:
    return StepTimes(
        *(statistics.fmean(column) for column in zip(*map(astuple, times), strict=True))
    )


class RecordedDDP:
    """A way to train whose hook keeps the times of its buckets."""

    def __init__(self, rank: Rank, module: nn.Module, collective: Collective) -> None:
        self._events: list[list[float]] = []  # of this step: hand-over, end
        self.bucket_bytes: list[int] = []
        net = DistributedDataParallel(module)
        net.register_comm_hook(None, self._recording(collective))
        self.way = Way(module, net, training._torch_sgd(module))

    def _recording(self, collective: Collective) -> Callable[[Any, dist.GradBucket], Future[Any]]:
        def hook(state: Any, bucket: dist.GradBucket) -> Future[Any]:
            event = [time.perf_counter()] * 2
            self._events.append(event)
            self.bucket_bytes.append(bucket.buffer().nbytes)

            def ended(future: Future[Any]) -> Any:
                event[1] = time.perf_counter()
                return future.value()

            return collective(bucket).then(ended)

        # DDP reads annotations, and knows these only as objects.
        hook.__annotations__ = {"bucket": dist.GradBucket, "return": Future[torch.Tensor]}
        return hook

    def begin(self) -> None:
        self._events, self.bucket_bytes = [], []

    def times(self, marks: list[float], communicates: bool) -> StepTimes:
        """After the last hand-over backward has nothing left to do but to wait, and to copy what came."""
        start, backward, _update, *_, end = marks
        handed = self._events[-1][0]
        usable = max(handed, *(event[1] for event in self._events))
        compute = union([(start, backward), (backward, handed), (usable, end)])
        comm = union([(a, b) for a, b in self._events]) if communicates else []
        return _step_times(end - start, compute, comm)


class RecordedAggregator:
    """Its own report tells."""

    def __init__(self, rank: Rank, module: nn.Module, update: str, communicates: bool) -> None:
        comm = rank.comm if communicates else _alone(rank)
        optimizer = par.SGD(
            module.parameters(), training.RATE, training.MOMENTUM, training.DECAY, nesterov=True
        )
        aggregator = par.GradientAggregator(module, comm, optimizer=optimizer, update=update)
        self.way = Way(module, module, optimizer, set_to_none=False, aggregator=aggregator)
        self._aggregator = aggregator
        self.bucket_bytes: list[int] = []

    def begin(self) -> None:
        pass

    def times(self, marks: list[float], communicates: bool) -> StepTimes:
        report = self._aggregator.report()
        self.bucket_bytes = [bucket["bytes"] for bucket in report["buckets"]]
        start, *_, end = marks
        zero_s = marks[-1] - marks[-2]  # after step() has returned
        return StepTimes(
            end - start,
            report["compute_s"] + zero_s,
            report["comm_busy_s"],
            report["exposed_comm_s"],
        )


def _step_times(wall_s: float, compute: list[Interval], comm: list[Interval]) -> StepTimes:
    hidden_s = length(intersection(comm, compute))
    return StepTimes(wall_s, length(compute), length(comm), length(comm) - hidden_s)


def _alone(rank: Rank) -> par.Communicator:
    """A communicator of this rank only: the same code, nothing to communicate."""
    if "alone" not in rank.kept:
        store = dist.PrefixStore(f"alone/{rank.rank}", dist.HashStore())
        rank.kept["alone"] = par.init(store=store, rank=0, size=1)
    alone: par.Communicator = rank.kept["alone"]
    return alone


def _recorded(
    rank: Rank, module: nn.Module, backend: str, communicates: bool
) -> RecordedDDP | RecordedAggregator:
    if backend.startswith("DDP"):
        collective = {"DDP (gloo)": _gloo, "DDP + our hook": _ours}[backend]
        return RecordedDDP(rank, module, (collective if communicates else _nothing)(rank))
    update = backend.removeprefix("aggregator, ")
    return RecordedAggregator(rank, module, update, communicates)


def build(rank: Rank, model: str, backend: str, batch: int) -> None:
    """The full variant and that without communication, each with a module of its own."""
    rank.kept["overlap"] = {}
    for variant in VARIANTS[:2]:
        torch.manual_seed(0)
        recorded = _recorded(rank, MODELS[model](), backend, communicates=variant == "full")
        rank.kept["overlap"][variant] = (recorded, Trainer(rank, recorded.way, batch))
    run_steps(rank, "full", SETTLE, 0)


def discard(rank: Rank) -> None:
    kept = rank.kept.pop("overlap", {})
    while kept:
        kept.popitem()[1][1].close()
    rank.kept.pop("buffers", None)


def run_steps(rank: Rank, variant: str, steps: int, first: int) -> list[StepTimes]:
    recorded, trainer = rank.kept["overlap"][variant]
    found = []
    for index in range(first, first + steps):
        recorded.begin()
        marks, _ = trainer.step(index)
        found.append(recorded.times(marks, variant == "full"))
    return found


def run_comm(rank: Rank, backend: str, steps: int) -> list[StepTimes]:
    """The buckets of the full variant, in order, each when the one before is done."""
    if "buffers" not in rank.kept:
        sizes = [nbytes // 4 for nbytes in rank.kept["overlap"]["full"][0].bucket_bytes]
        assert sizes
        make = torch.empty if backend.startswith("DDP") else rank.comm.symmetric_empty
        rank.kept["buffers"] = [make(size) for size in sizes]
    call = dist.all_reduce if backend == "DDP (gloo)" else rank.comm.all_reduce
    found = []
    for _ in range(steps):
        for buffer in rank.kept["buffers"]:
            buffer.fill_(1.0)
        rank.comm.barrier()
        start = time.perf_counter()
        for buffer in rank.kept["buffers"]:
            call(buffer)
        wall_s = time.perf_counter() - start
        assert all(bool((buffer == rank.size).all()) for buffer in rank.kept["buffers"])
        found.append(StepTimes(wall_s, 0.0, wall_s, wall_s))
    return found


# --- in the coordinator ----------------------------------------------------------------------------------------------


class Ablation:
    """The variants of one model and backend as a source."""

    methods = VARIANTS

    def __init__(self, ranks: RankSet, model: str, backend: str, batch: int) -> None:
        self._ranks, self._backend = ranks, backend
        self._blocks: dict[str, list[list[list[StepTimes]]]] = {v: [] for v in VARIANTS}
        ranks.call(build, model, backend, batch)

    def block(self, method: str, calls: int, first: int) -> Block:
        start = time.monotonic()
        if method == "communication only":
            by_rank = self._ranks.call(run_comm, self._backend, calls)
        else:
            by_rank = self._ranks.call(run_steps, method, calls, first)
        steps = [list(step) for step in zip(*by_rank, strict=True)]
        self._blocks[method].append(steps)
        slowest = [max(times.wall_s for times in step) for step in steps]
        return Block(slowest, [step[0].wall_s for step in steps], 0, time.monotonic() - start)

    def means(self, blocks: int) -> dict[str, StepTimes]:
        """By variant, over the last blocks without the two extreme ones."""
        by_block = [
            {v: _mean([times for step in self._blocks[v][b] for times in step]) for v in VARIANTS}
            for b in range(-blocks, 0)
        ]
        by_block.sort(key=lambda means: means["full"].wall_s - means["no communication"].wall_s)
        inner = by_block[1:-1] if blocks > 2 else by_block
        return {v: _mean([means[v] for means in inner]) for v in VARIANTS}

    def close(self) -> None:
        self._ranks.call(discard)


@dataclass(frozen=True)
class Overlap:
    """The figures of one model and backend: the mean step with communication, and without, and communication alone."""

    full: StepTimes
    nocomm: StepTimes
    comm_only: StepTimes

    @property
    def exposed_s(self) -> float:
        """By ablation; may be negative."""
        return self.full.wall_s - self.nocomm.wall_s

    @property
    def overlap_ratio(self) -> float | None:
        if self.full.comm_s == 0:
            return None
        return 1 - self.full.exposed_s / self.full.comm_s

    @property
    def hidden_fraction(self) -> float:
        return 1 - self.exposed_s / self.comm_only.wall_s

    @property
    def parts_s(self) -> dict[str, float]:
        """What the ablation sees and the trace does not; their sum is the difference between the two."""
        full, nocomm = self.full, self.nocomm
        return {
            "compute": full.compute_s - nocomm.compute_s,
            "idle": full.idle_s - nocomm.idle_s,
            "exposed anyway": -nocomm.exposed_s,
        }

    def verdict(self) -> str:
        difference_s = self.exposed_s - self.full.exposed_s
        if abs(difference_s) <= AGREE * max(abs(self.exposed_s), self.full.exposed_s):
            return "agree"
        parts = ", ".join(f"{name} {part_s * 1e3:+.1f}" for name, part_s in self.parts_s.items())
        return f"differ by {difference_s * 1e3:+.1f} ms: {parts}"

    def as_json(self) -> dict[str, Any]:
        return {
            "t_full_us": self.full.wall_s * 1e6,
            "t_nocomm_us": self.nocomm.wall_s * 1e6,
            "t_comm_us": self.comm_only.wall_s * 1e6,
            "trace_exposed_us": self.full.exposed_s * 1e6,
            "trace_comm_busy_us": self.full.comm_s * 1e6,
            "overlap_ratio": self.overlap_ratio,
            "ablation_exposed_us": self.exposed_s * 1e6,
            "hidden_fraction": self.hidden_fraction,
            "compute_slowdown": self.full.compute_s / self.nocomm.compute_s,
            "parts_us": {name: part_s * 1e6 for name, part_s in self.parts_s.items()},
            "verdict": self.verdict(),
        }


def measure(
    ranks: RankSet, model: str, backend: str, batch: int, blocks: int, steps: int
) -> tuple[Overlap, dict[str, Samples]]:
    ablation = Ablation(ranks, model, backend, batch)
    try:
        samples = interleave([ablation], blocks, 0.0, steps)
    finally:
        ablation.close()

    means = ablation.means(blocks)
    found = Overlap(*(means[variant] for variant in VARIANTS))
    return found, samples


def table(book: Book) -> list[str]:
    header = [
        "model", "backend", "T_full", "T_nocomm", "T_comm", "exposed: trace", "exposed: ablation",
        "overlap ratio", "hidden fraction", "compute slowdown", "trace and ablation",
    ]  # fmt: skip
    rows = []
    for record in book.select("overlap"):
        figures = record["extra"]
        ratio = figures["overlap_ratio"]
        ms = [
            f"{figures[key] / 1e3:.1f} ms"
            for key in (
                "t_full_us", "t_nocomm_us", "t_comm_us", "trace_exposed_us", "ablation_exposed_us"
            )
        ]  # fmt: skip
        rows.append(
            [
                record["model"],
                record["backend"],
                *ms,
                "-" if ratio is None else f"{ratio:.2f}",
                f"{figures['hidden_fraction']:.2f}",
                f"{figures['compute_slowdown']:.3f}",
                figures["verdict"],
            ]
        )
    return markdown(header, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["resnet50"])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="images per rank (default 4)")
    parser.add_argument("--steps", type=int, default=50, help="measured steps (default 50)")
    parser.add_argument("--blocks", type=int, default=5, help="interleaved blocks (default 5)")
    options = parser.parse_args()
    steps = -(-options.steps // options.blocks)
    book = Book(HERE / "results", sys.argv[1:], options.blocks)
    ranks = RankSet("torch", options.ranks)
    try:
        for model in options.models:
            for backend in options.backends:
                found, samples = measure(
                    ranks, model, backend, options.batch, options.blocks, steps
                )
                book.add(
                    "overlap",
                    samples,
                    extra=found.as_json(),
                    model=model,
                    backend=backend,
                    ranks=options.ranks,
                    batch=options.batch,
                )
                print(f"{model}, {backend}: {found.verdict()}", file=sys.stderr)
    finally:
        ranks.close()
    print("\n".join(table(book)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
