"""What one comparison of the replica-drift sentinel costs, beside a training step of the same model.

A comparison is a read of parameters and momentum, by all ranks at once, and one all-gather of a number per rank; it is
measured alone, since the noise of a step is as large. Of an eager aggregator it is half: no momentum.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import pyallreduce as par
from benchmarks.harness import Block
from benchmarks.peers import RankSet
from benchmarks.rank import Rank
from benchmarks.training import MODELS, Trainer, Way
from pyallreduce.drift import DriftSentinel

EVERY = 100  # the default of GradientAggregator
METHODS = ("step", "check")


def _prepare(rank: Rank, model: str, batch: int) -> tuple[Trainer, DriftSentinel]:
    torch.manual_seed(0)
    module = MODELS[model]()
    optimizer = par.SGD(module.parameters(), 1e-4)
    aggregator = par.GradientAggregator(module, rank.comm, optimizer=optimizer, check_every=0)
    trainer = Trainer(rank, Way(module, module, optimizer, False, aggregator), batch)
    named = list(module.named_parameters())
    return trainer, DriftSentinel(rank.comm, named, named, optimizer, every=1)


def run_block(
    rank: Rank, model: str, batch: int, method: str, calls: int, first: int
) -> list[float]:
    """Seconds by call. A comparison raises if the ranks' replicas differ."""
    if "drift" not in rank.kept:
        rank.kept["drift"] = _prepare(rank, model, batch)
    trainer, sentinel = rank.kept["drift"]
    seconds = []
    for index in range(first, first + calls):
        if method == "step":
            times, _ = trainer.step(index)
            seconds.append(times[-1] - times[0])
        else:
            rank.comm.barrier()
            start = time.perf_counter()
            sentinel.look()
            sentinel.gather()
            sentinel.finish()
            seconds.append(time.perf_counter() - start)
    return seconds


def discard(rank: Rank) -> None:
    rank.kept.pop("drift")[0].close()


class Drift:
    """A rank set with one model as a source. ``close`` frees it."""

    methods = METHODS

    def __init__(self, ranks: RankSet, model: str, batch: int) -> None:
        self._ranks, self._what = ranks, (model, batch)

    def block(self, method: str, calls: int, first: int) -> Block:
        start = time.monotonic()
        by_rank: list[Any] = self._ranks.call(run_block, *self._what, method, calls, first)
        slowest = [max(call) for call in zip(*by_rank, strict=True)]
        return Block(slowest, by_rank[0], 0, time.monotonic() - start)

    def close(self) -> None:
        self._ranks.call(discard)
