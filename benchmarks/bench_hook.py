"""DDP with our hook against DDP as it is (gloo): one line in a user's script, and nothing else changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.harness import Book, Samples, interleave
from benchmarks.peers import RankSets
from benchmarks.training import NO_COMMUNICATION, Training, overhead_us

RANKS = 2
WAYS = ["DDP (gloo)", "DDP + our hook", NO_COMMUNICATION]
STEPS = {"mlp": 20, "resnet18": 6, "resnet50": 3, "vgg11": 1}  # of a block
QUICK = ["mlp", "resnet18"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    models = QUICK if metafunc.config.getoption("quick") else list(STEPS)
    metafunc.parametrize("measured", models, indirect=True, scope="module")


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, rank_sets: RankSets, book: Book, blocks: int, batch: int
) -> tuple[dict[str, Samples], dict[str, list[float]]]:
    """Samples and first losses by way."""
    model: str = request.param
    (ranks,) = rank_sets.of(RANKS, "torch")
    training = Training(ranks, model, WAYS, batch)
    try:
        samples = interleave([training], blocks, 0.0, STEPS[model])
    finally:
        training.close()
    gain_us = overhead_us(samples["DDP (gloo)"], samples["DDP + our hook"])
    book.add("hook", samples, extra={"gain_us": gain_us}, model=model, ranks=RANKS, batch=batch)
    return samples, training.first_losses()


@pytest.mark.parametrize("method", WAYS)
def test_hook(
    measured: tuple[dict[str, Samples], dict[str, list[float]]],
    method: str,
    replay: Callable[[str, Samples], None],
    request: pytest.FixtureRequest,
) -> None:
    samples, losses = measured
    replay(f"hook, {request.node.callspec.params['measured']}", samples[method])
    assert samples[method].wrong == 0  # the ranks' parameters are equal, bit by bit
    assert losses["DDP + our hook"] == pytest.approx(losses["DDP (gloo)"], rel=1e-3)
