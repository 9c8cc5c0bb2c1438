"""Worker processes that compute items[request]: torch's DataLoader, and what it leaves to its users."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import signal
import warnings
import weakref
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

# After SIGTERM the rank may still write a checkpoint, for which it needs no more images, but a
# worker that died under it would be an error. So workers outlive the signal, though not for ever.
OUTLIVE_SIGTERM_S = 120
_PR_SET_PDEATHSIG = 1


class Processes:
    """`workers` processes (0: this one), at most `ahead` requests per worker before what is taken.

    They serve one series of requests after the other: to start them takes as long as some batches.
    They end when this object does, or with its process, however that ends.
    """

    def __init__(self, items: Any, workers: int, ahead: int, pin_memory: bool = False) -> None:
        self._requests = _Requests()
        with _without_advice():
            self._loader: Any = DataLoader(
                items,
                sampler=self._requests,
                batch_size=None,  # a request is a whole batch
                collate_fn=_as_it_is,
                num_workers=workers,
                prefetch_factor=ahead if workers else None,
                persistent_workers=workers > 0,
                worker_init_fn=_prepare_worker,
                pin_memory=pin_memory,
                # Else it would take its seed from torch's own generator, a part of the checkpoint.
                generator=torch.Generator(),
                # A worker starts in milliseconds and shares the index; the core closes what is its own.
                multiprocessing_context="fork" if workers else None,
            )
        _open.add(self)

    def answers(self, requests: Iterable[Any]) -> Iterator[Any]:
        """items[request] for each request, in order. Once, and then again whenever `are_idle`."""
        answers = self._answers(requests)
        _open.add(answers)
        return answers

    def _answers(self, requests: Iterable[Any]) -> Generator[Any, None, None]:
        self._requests.begin(requests)
        with _without_advice():
            answers = iter(self._loader)
        # Anew behind torch's own registration, so that it runs before that one.
        atexit.unregister(_close_all)
        atexit.register(_close_all)
        for answer in answers:
            self._requests.unanswered -= 1
            yield answer

    @property
    def are_idle(self) -> bool:
        """Every request has been answered, even if nobody has asked whether there is another one."""
        return self._requests.exhausted and not self._requests.unanswered

    def close(self) -> None:
        self._loader = None


class _Requests:
    """A sampler, which a DataLoader keeps for its life: of another series of requests each time."""

    def __init__(self) -> None:
        self.begin(())

    def begin(self, requests: Iterable[Any]) -> None:
        self._requests = requests
        self.unanswered, self.exhausted = 0, False

    def __iter__(self) -> Iterator[Any]:
        for request in self._requests:
            self.unanswered += 1
            yield request
        self.exhausted = True


_open: weakref.WeakSet[Processes | Generator[Any, None, None]] = weakref.WeakSet()


def _close_all() -> None:
    """At exit. Python would send its children SIGTERM, which ours outlive, and wait for them."""
    for each in list(_open):
        each.close()


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """On more processes than cores, given time and again; data-bench measures what is best."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


def _as_it_is(batch: Any) -> Any:
    return batch


def _prepare_worker(worker: int) -> None:
    """Signals are for the rank, which ends its workers; they end by themselves when it is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(OUTLIVE_SIGTERM_S))
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
