"""What all ranks ask each other in every iteration: has anyone been told to stop, is a loss not finite?

All of them get the answer in the same iteration, so they save, or fail, together.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

import pyallreduce as par
from train import signals

T = TypeVar("T")


class Interrupted(Exception):
    """A rank has got a request to stop, and all ranks know it at the same point of the run.

    `step` is the iteration whose checkpoint has been written.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signals.name(number)}")
        self.step: int | None = None


class Watch:
    """One all-reduce of 16 bytes per iteration, where the ranks have just met in the aggregation.

    About 10 us of an iteration (2 ranks, 2 cores).
    """

    def __init__(self, comm: par.Communicator) -> None:
        self._comm = comm
        self._flags = torch.zeros(2, dtype=torch.int64)  # signal, 1 + rank with a bad loss
        self._late: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._signal = 0

    def check(self, loss: Tensor, step: int, lr: float) -> None:
        """Collective, in every iteration, before its update: `loss` is this rank's.

        FloatingPointError on all ranks if one's is not finite.
        """
        culprit = self._ask(0 if self._is_finite(loss) else 1 + self._comm.rank)
        if culprit:
            raise FloatingPointError(
                f"the loss of rank {culprit - 1} is not finite in iteration {step + 1}, at learning "
                f"rate {lr:g}; nothing has been saved since the last checkpoint. Lower --lr, make "
                "the warmup longer with --warmup-epochs, or look for damaged images"
            )

    def stop_if_asked(self) -> None:
        """After `check`, between two iterations. Interrupted on all ranks or on none."""
        if self._signal:
            raise Interrupted(self._signal)

    def poll(self) -> None:
        """Collective, for long work between iterations. Interrupted on all ranks or on none."""
        self._ask(0)
        self.stop_if_asked()

    def polled(self, batches: Iterable[T], rounds: int) -> Iterator[T]:
        """Collective: the batches, of which no rank has more than `rounds`, with as many polls."""
        source = iter(batches)
        for _ in range(rounds):
            self.poll()
            batch = next(source, None)
            if batch is not None:
                yield batch

    def _ask(self, culprit: int) -> int:
        self._flags[0], self._flags[1] = signals.received(), culprit
        self._comm.all_reduce(self._flags, op="max")
        self._signal, culprit = self._flags.tolist()
        return culprit

    def _is_finite(self, loss: Tensor) -> bool:
        """On a GPU, of the iteration before: reading this one's loss would stall the device."""
        if not loss.is_cuda:
            return math.isfinite(loss.item())
        copy, copied = torch.empty((), pin_memory=True), torch.cuda.Event()
        copy.copy_(loss.detach(), non_blocking=True)
        copied.record()
        self._late.append((copy, copied))
        if len(self._late) == 1:
            return True
        copy, copied = self._late.popleft()
        copied.synchronize()
        return math.isfinite(copy.item())
