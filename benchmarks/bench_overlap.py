"""How much communication is hidden, by trace and by ablation; ``python -m benchmarks.overlap`` has more steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.harness import Book, Samples
from benchmarks.overlap import BACKENDS, VARIANTS, Overlap, measure
from benchmarks.peers import RankSets

RANKS = 2
STEPS = 4  # of a block
MODEL, QUICK_MODEL = "resnet50", "resnet18"


@pytest.fixture(scope="module", params=BACKENDS)
def measured(
    request: pytest.FixtureRequest,
    rank_sets: RankSets,
    book: Book,
    blocks: int,
    quick: bool,
    batch: int,
) -> tuple[Overlap, dict[str, Samples]]:
    backend: str = request.param
    model = QUICK_MODEL if quick else MODEL
    (ranks,) = rank_sets.of(RANKS, "torch")
    found, samples = measure(ranks, model, backend, batch, blocks, STEPS)
    book.add(
        "overlap",
        samples,
        extra=found.as_json(),
        model=model,
        backend=backend,
        ranks=RANKS,
        batch=batch,
    )
    return found, samples


@pytest.mark.parametrize("variant", VARIANTS)
def test_overlap(
    measured: tuple[Overlap, dict[str, Samples]],
    variant: str,
    replay: Callable[[str, Samples], None],
    request: pytest.FixtureRequest,
) -> None:
    found, samples = measured
    replay(f"overlap, {request.node.callspec.params['measured']}", samples[variant])
    assert found.full.comm_s > 0
    assert 0 <= found.full.exposed_s <= found.full.comm_s
