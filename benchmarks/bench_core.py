"""The library's own costs: the core without Python, the fingerprint of a call, the bookkeeping of an iteration, the
comparison of replicas."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from benchmarks.bookkeeping import METHODS, Bookkeeping
from benchmarks.collectives import Case
from benchmarks.drift import EVERY, Drift
from benchmarks.drift import METHODS as METHODS_OF_DRIFT
from benchmarks.harness import Book, Samples, interleave
from benchmarks.native import Program, core_program
from benchmarks.peers import RankSets
from benchmarks.training import overhead_us

KIB, MIB = 1 << 10, 1 << 20
METHODS_OF_CORE = ["core", "floor"]  # on the same memory, in the same processes
BLOCK_S = 0.05
MIN_CALLS = 5


def core_cases(quick: bool) -> list[Case]:
    large = [] if quick else [(25 * MIB, "hot"), (25 * MIB, "cold"), (100 * MIB, "hot")]
    return [Case(n, *how) for n in (2, 4) for how in ((4 * KIB, "hot"), *large)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "core" in metafunc.fixturenames:
        wanted = core_cases(metafunc.config.getoption("quick"))
        metafunc.parametrize("core", wanted, ids=str, indirect=True, scope="module")


@pytest.fixture(scope="module")
def core(request: pytest.FixtureRequest, book: Book, blocks: int) -> dict[str, Samples]:
    case: Case = request.param
    program = Program(
        METHODS_OF_CORE,
        core_program("core_all_reduce"),
        "symmetric",
        case.ranks,
        case.nbytes,
        case.cache == "cold",
    )
    try:
        samples = interleave([program], blocks, BLOCK_S, MIN_CALLS)
    finally:
        program.close()
    book.add("core", samples, ranks=case.ranks, bytes=case.nbytes, cache=case.cache)
    return samples


@pytest.mark.parametrize("method", METHODS_OF_CORE)
def test_core(
    core: dict[str, Samples],
    method: str,
    replay: Callable[[str, Samples], None],
    request: pytest.FixtureRequest,
) -> None:
    replay(f"core, {request.node.callspec.params['core']}", core[method])
    assert core[method].wrong == 0


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


@pytest.fixture(scope="module")
def drift(
    rank_sets: RankSets, book: Book, blocks: int, quick: bool, batch: int
) -> dict[str, Samples]:
    model = "mlp" if quick else "resnet50"
    (ranks,) = rank_sets.of(2, "torch")
    source = Drift(ranks, model, batch)
    try:
        samples = interleave([source], blocks, 0.0, 2)
    finally:
        source.close()
    share = samples["check"].median / EVERY / samples["step"].median
    book.add("drift", samples, extra={"share": share}, model=model, ranks=2, batch=batch)
    return samples


@pytest.mark.parametrize("method", METHODS_OF_DRIFT)
def test_drift(
    drift: dict[str, Samples], method: str, replay: Callable[[str, Samples], None]
) -> None:
    replay("drift", drift[method])
