"""The library's own costs: the core without Python, the fingerprint of a call, the bookkeeping of an iteration."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from benchmarks.bookkeeping import METHODS, Bookkeeping
from benchmarks.harness import Book, Samples, interleave
from benchmarks.native import Program, core_program, floor_program
from benchmarks.peers import RankSets
from benchmarks.training import overhead_us

BYTES = 4 << 10
BLOCK_S = 0.05
MIN_CALLS = 20


@pytest.fixture(scope="module", params=[2, 4], ids=lambda ranks: f"{ranks}-ranks")
def latency(request: pytest.FixtureRequest, book: Book, blocks: int) -> dict[str, Samples]:
    ranks: int = request.param
    programs = [
        Program("core", core_program("core_latency"), "symmetric", ranks, BYTES),
        Program("floor", floor_program("all_reduce"), "shared", ranks, BYTES),
    ]
    try:
        samples = interleave(programs, blocks, BLOCK_S, MIN_CALLS)
    finally:
        for program in programs:
            program.close()
    book.add("core_latency", samples, ranks=ranks, bytes=BYTES)
    return samples


@pytest.mark.parametrize("method", ["core", "floor"])
def test_core_latency(
    latency: dict[str, Samples],
    method: str,
    replay: Callable[[str, Samples], None],
    request: pytest.FixtureRequest,
) -> None:
    replay(f"core latency, {request.node.callspec.params['latency']} ranks", latency[method])
    assert latency[method].wrong == 0


def test_fingerprint(book: Book, blocks: int, replay: Callable[[str, Samples], None]) -> None:
    """Making one and comparing it with another rank's; a sample is the mean of 1000 calls."""
    command = [str(core_program("fingerprint")), "2", "21"]
    runs = [
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
        for _ in range(blocks)
    ]
    samples = Samples([[float(line) for line in run.split()] for run in runs])
    book.add("fingerprint", {"fingerprint": samples}, ranks=2)
    replay("fingerprint", samples)


@pytest.fixture(scope="module")
def bookkeeping(rank_sets: RankSets, book: Book, blocks: int) -> dict[str, Samples]:
    (ranks,) = rank_sets.of(1, "torch")
    samples = interleave([Bookkeeping(ranks)], blocks, BLOCK_S, MIN_CALLS)
    hooks_us = overhead_us(samples["aggregator"], samples["plain"])
    report_us = samples["report"].median * 1e6
    book.add("bookkeeping", samples, extra={"hooks_us": hooks_us, "report_us": report_us})
    return samples


@pytest.mark.parametrize("method", METHODS)
def test_bookkeeping(
    bookkeeping: dict[str, Samples], method: str, replay: Callable[[str, Samples], None]
) -> None:
    replay("bookkeeping", bookkeeping[method])
    assert bookkeeping[method].wrong == 0  # it had the buckets that it should have
