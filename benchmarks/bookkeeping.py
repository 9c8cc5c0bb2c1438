"""What the aggregator's hooks, events and reports cost per iteration, apart from any communication.

Two modules of one rank, with as many parameters (and buckets) as ResNet-50 but hardly any compute: one plain, one with
an aggregator. With one rank nothing is communicated, so the difference is bookkeeping, seen without the noise of
milliseconds that a real step has.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn as nn

import pyallreduce as par
from benchmarks.harness import Block
from benchmarks.peers import RankSet
from benchmarks.rank import Rank

PARAMETERS, BUCKETS = 161, 5  # of ResNet-50, with the default bucket_bytes
WIDTH = 16

METHODS = ("plain", "aggregator", "report")


class Hollow(nn.Module):
    """Uses its parameters one after the other, as layers are."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(WIDTH)) for _ in range(PARAMETERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = x * weight
        return x


@dataclass
class Kept:
    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    aggregator: par.GradientAggregator


def _prepare(rank: Rank) -> Kept:
    modules: dict[str, nn.Module] = {"plain": Hollow(), "aggregator": Hollow()}
    optimizers: dict[str, torch.optim.Optimizer] = {
        name: par.SGD(module.parameters(), lr=1e-3) for name, module in modules.items()
    }
    bucket_bytes = 4 * WIDTH * -(-PARAMETERS // BUCKETS)
    aggregator = par.GradientAggregator(
        modules["aggregator"],
        rank.comm,
        bucket_bytes=bucket_bytes,
        optimizer=optimizers["aggregator"],
    )
    return Kept(modules, optimizers, aggregator)


def _iterate(module: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    start = time.perf_counter()
    module(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return time.perf_counter() - start


def run_block(rank: Rank, method: str, calls: int) -> tuple[list[float], int]:
    """Seconds by call, and by how many buckets the aggregator is not what it should be."""
    if "bookkeeping" not in rank.kept:
        rank.kept["bookkeeping"] = _prepare(rank)
    kept: Kept = rank.kept["bookkeeping"]
    x = torch.full((WIDTH,), 1e-3)
    seconds = []
    for _ in range(calls):
        if method == "report":
            start = time.perf_counter()
            kept.aggregator.report()
            seconds.append(time.perf_counter() - start)
        else:
            seconds.append(_iterate(kept.modules[method], kept.optimizers[method], x))
    buckets = len(kept.aggregator.report()["buckets"])  # 0 before its first iteration
    return seconds, abs(buckets - BUCKETS) if buckets else 0


class Bookkeeping:
    """A rank set of one rank as a source."""

    methods = METHODS

    def __init__(self, ranks: RankSet) -> None:
        self._ranks = ranks

    def block(self, method: str, calls: int, first: int) -> Block:
        start = time.monotonic()
        ((seconds, wrong),) = self._ranks.call(run_block, method, calls)
        return Block(seconds, seconds, wrong, time.monotonic() - start)
