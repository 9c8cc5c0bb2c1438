"""Logical workers: k of n images each, one per process or several in turn (PAPER 1.4, footnote 5).

Several workers of one process are gradient accumulation, made equal to as many processes: batch norm
sees n images at a time, and running averages move once per iteration, with the first worker's
images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext

from torch import Tensor, nn

import pyallreduce as par
from train.recipe import batch_norms, frozen_statistics

Batch = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Minibatch:
    """One iteration: `total` images over all workers; iterating gives those of this process's.

    `batches` holds one batch for each of the `workers` of this process, an empty one for a worker
    that a small last minibatch leaves without images. A backward for each is due before the next.
    """

    total: int
    batches: Iterator[Batch]
    workers: Sequence[int]
    norms: Sequence[nn.Module]
    aggregator: par.GradientAggregator

    def __iter__(self) -> Iterator[Batch]:
        for worker in self.workers:
            is_first, is_last = worker == self.workers[0], worker == self.workers[-1]
            with (
                nullcontext() if is_first else frozen_statistics(self.norms),
                nullcontext() if is_last else self.aggregator.no_sync(),
            ):
                yield next(self.batches)  # a missing one is an error, not a smaller sum


def minibatches(
    totals: Iterable[int],
    batches: Iterator[Batch],
    workers: Sequence[int],
    model: nn.Module,
    aggregator: par.GradientAggregator,
) -> Iterator[Minibatch]:
    """The iterations whose sizes are `totals`; `batches` come worker by worker."""
    norms = batch_norms(model)
    for total in totals:
        yield Minibatch(total, batches, workers, norms, aggregator)
