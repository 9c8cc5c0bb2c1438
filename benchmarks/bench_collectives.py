"""All-reduce on one host: ours on symmetric memory and on plain tensors, gloo, MPICH, Open MPI, and the floors."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.collectives import ALL_METHODS, BACK_TO_BACK, Case, sources_of
from benchmarks.harness import Book, Samples, interleave
from benchmarks.peers import RankSets

KIB, MIB = 1 << 10, 1 << 20
SWEEP = [KIB << shift for shift in range(0, 17, 2)] + [25 * MIB, 100 * MIB]
COLD = [25 * MIB, 100 * MIB]
QUICK = [4 * KIB, 256 * KIB, 25 * MIB]
BLOCK_S, QUICK_BLOCK_S = 0.07, 0.05
MIN_CALLS = 3


def cases(quick: bool) -> list[Case]:
    """By number of ranks, so that each set of ranks starts once."""
    hot, cold = (QUICK, COLD[:1]) if quick else (SWEEP, COLD)
    return [
        case
        for n in (2, 4)
        for case in (
            *(Case(n, nbytes) for nbytes in hot),
            *(Case(n, nbytes, "cold") for nbytes in cold),
            Case(n, 4 * KIB, BACK_TO_BACK),
        )
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = cases(metafunc.config.getoption("quick"))
    metafunc.parametrize("measured", wanted, ids=str, indirect=True, scope="module")


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, rank_sets: RankSets, book: Book, blocks: int, quick: bool
) -> dict[str, Samples]:
    case: Case = request.param
    sources, floors = sources_of(case, rank_sets.of(case.ranks, "torch", "mpich", "openmpi"))
    try:
        samples = interleave(sources, blocks, QUICK_BLOCK_S if quick else BLOCK_S, MIN_CALLS)
    finally:
        for floor in floors:
            floor.close()
    book.add(
        "all_reduce",
        samples,
        missing=rank_sets.problems,
        extra={"libraries": rank_sets.libraries()},
        ranks=case.ranks,
        bytes=case.nbytes,
        cache=case.cache,
        dtype="float32",
        op="sum",
    )
    return samples


@pytest.mark.parametrize("method", ALL_METHODS)
def test_all_reduce(
    measured: dict[str, Samples],
    method: str,
    rank_sets: RankSets,
    replay: Callable[[str, Samples], None],
    request: pytest.FixtureRequest,
) -> None:
    if method not in measured:
        pytest.skip(rank_sets.problems.get(method, "no floor of calls back to back"))
    replay(str(request.node.callspec.params["measured"]), measured[method])
    assert measured[method].wrong == 0
