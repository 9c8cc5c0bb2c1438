"""All-reduce of one size, by every method, in the ranks' processes; and the sources that ask them for it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.harness import Block, Source, evict_bytes, size_name
from benchmarks.native import Program, floor_program
from benchmarks.peers import RankSet
from benchmarks.rank import Rank

METHODS = {
    "torch": ("symmetric", "plain", "gloo"),
    "mpich": ("mpich",),
    "openmpi": ("openmpi",),
}
# By label: program and mode, see floors/.
FLOORS = {
    "floor": ("all_reduce", "shared"),
    "floor, staged": ("plain", "staged"),
    "floor, readv": ("plain", "readv"),
}
ALL_METHODS = [*FLOORS, *(method for methods in METHODS.values() for method in methods)]


@dataclass(frozen=True)
class Case:
    """An all-reduce (sum, float32, in place). ``cache``: hot, right after the data were written, as after backward;
    or cold, when every rank has since walked through four times the last-level cache; or back to back: many calls in a
    loop, timed together, as latency is usually measured (after a barrier, ranks that outnumber the cores wait for each
    other's data to be written and verified, too)."""

    ranks: int
    nbytes: int
    cache: str = "hot"

    def __str__(self) -> str:
        """Fit for ``pytest -k``."""
        words = f"{self.ranks} ranks", size_name(self.nbytes).replace(" ", ""), self.cache
        return "-".join(words).replace(" ", "-")


BACK_TO_BACK = "back to back"
# Sums of sums grow by the number of ranks each time; 2^18 x 4^31 is still a float32.
LOOP_CALLS = 32


class Pattern:
    """Whole numbers, so that sums are exact, that differ in every call, rank and tile; as in floors/host.h.

    The length of a tile is prime: data in the wrong place never look right. A tile stays in the second-level cache:
    writing the pattern costs what writing any gradient costs.
    """

    TILE = 16381

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        tiles = [
            np.random.default_rng(r).integers(-32768, 32768, self.TILE).astype(np.float32)
            for r in range(size)
        ]
        self._mine: np.ndarray = tiles[rank]
        self._sum = np.stack(tiles).sum(axis=0, dtype=np.float32)
        self._scratch = np.empty_like(self._sum)

    def _offset(self, rank: int, call: int, tile: int) -> np.float32:
        return np.float32((call * 7919 + rank * 104729 + tile * 31) % 1021)

    def write(self, to: np.ndarray, call: int) -> None:
        for tile, begin in enumerate(range(0, to.size, self.TILE)):
            part = to[begin : begin + self.TILE]
            np.add(self._mine[: part.size], self._offset(self._rank, call, tile), out=part)

    def count_wrong(self, data: np.ndarray, call: int) -> int:
        """Elements of ``data`` that are not the sum of what all ranks wrote for ``call``."""
        wrong = 0
        for tile, begin in enumerate(range(0, data.size, self.TILE)):
            part = data[begin : begin + self.TILE]
            offset = sum(self._offset(r, call, tile) for r in range(self._size))
            right = np.add(self._sum[: part.size], offset, out=self._scratch[: part.size])
            wrong += int(np.count_nonzero(part != right))
        return wrong


# --- in the ranks' processes -----------------------------------------------------------------------------------------


@dataclass
class Prepared:
    data: np.ndarray
    call: Callable[[], Any]
    barrier: Callable[[], Any]


def _prepare_torch(rank: Rank, method: str, numel: int) -> Prepared:
    import torch
    import torch.distributed as dist

    tensor = rank.comm.symmetric_empty(numel) if method == "symmetric" else torch.empty(numel)
    calls = {
        "symmetric": lambda: rank.comm.all_reduce(tensor),
        "plain": lambda: rank.comm.all_reduce(tensor),
        "gloo": lambda: dist.all_reduce(tensor),
    }
    return Prepared(tensor.numpy(), calls[method], rank.comm.barrier)


def _prepare_mpi(rank: Rank, method: str, numel: int) -> Prepared:
    from mpi4py import MPI

    data = np.empty(numel, np.float32)
    buffer = [data, MPI.FLOAT]
    return Prepared(data, lambda: rank.comm.Allreduce(MPI.IN_PLACE, buffer), rank.comm.Barrier)


def _prepared(rank: Rank, method: str, nbytes: int) -> Prepared:
    """Made once per method and size; the buffers of another size are let go first."""
    if rank.kept.get("nbytes") != nbytes:
        rank.kept["nbytes"], rank.kept["prepared"] = nbytes, {}
    prepared: dict[str, Prepared] = rank.kept["prepared"]
    if method not in prepared:
        prepare = _prepare_mpi if method in ("mpich", "openmpi") else _prepare_torch
        prepared[method] = prepare(rank, method, nbytes // 4)
    return prepared[method]


def _evict(rank: Rank) -> None:
    """Walks through dirty lines of its own, as floors/host.h does: the data are in memory then."""
    if "evict" not in rank.kept:
        rank.kept["evict"] = np.zeros(evict_bytes() // 4, np.int32)
    rank.kept["evict"][::16] += 1


def run_block(
    rank: Rank, method: str, nbytes: int, cache: str, calls: int, first: int
) -> tuple[list[float], int]:
    """Seconds of each call on this rank, and the number of wrong elements in its results. Back to back: of each loop's
    mean call."""
    prepared = _prepared(rank, method, nbytes)
    pattern = rank.kept.setdefault("pattern", Pattern(rank.rank, rank.size))
    data, call, barrier = prepared.data, prepared.call, prepared.barrier
    seconds, wrong = [], 0
    loop_calls = LOOP_CALLS if cache == BACK_TO_BACK else 1
    growth = np.float32(rank.size) ** (loop_calls - 1)  # exact for a power of 2
    gc.disable()
    try:
        for index in range(first, first + calls):
            pattern.write(data, index)
            if cache == "cold":
                _evict(rank)
            barrier()
            start = time.perf_counter()
            for _ in range(loop_calls):
                call()
            seconds.append((time.perf_counter() - start) / loop_calls)
            barrier()  # else who returned first checks its sums for a time slice on the core that others return on
            if loop_calls > 1:
                data /= growth
            wrong += pattern.count_wrong(data, index)
    finally:
        gc.enable()
    return seconds, wrong


# --- in the coordinator ----------------------------------------------------------------------------------------------


class Collective:
    """A rank set as a source of blocks of one case."""

    def __init__(self, ranks: RankSet, case: Case) -> None:
        self.methods = METHODS[ranks.name]
        self._ranks, self._case = ranks, case

    def block(self, method: str, calls: int, first: int) -> Block:
        start = time.monotonic()
        case = self._case
        by_rank = self._ranks.call(run_block, method, case.nbytes, case.cache, calls, first)
        times = [seconds for seconds, _ in by_rank]
        wrong = sum(wrong for _, wrong in by_rank)
        slowest = [max(call) for call in zip(*times, strict=True)]
        return Block(slowest, times[0], wrong, time.monotonic() - start)


def sources_of(case: Case, sets: list[RankSet]) -> tuple[list[Source], list[Program]]:
    """All that can measure the case; the floor programs among them are to be closed."""
    floors = [
        Program([label], floor_program(name), mode, case.ranks, case.nbytes, case.cache == "cold")
        for label, (name, mode) in FLOORS.items()
        if case.cache != BACK_TO_BACK  # which says nothing about memory
    ]
    return [*(Collective(ranks, case) for ranks in sets), *floors], floors
