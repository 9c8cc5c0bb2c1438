"""Whole training steps: what gradient exchange and update add to the plain module's forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from benchmarks.harness import Book, Samples, interleave
from benchmarks.native import Program, floor_program
from benchmarks.peers import RankSet, RankSets
from benchmarks.training import MODELS, WAYS, Training, overhead_us

RANKS = 2
FLOORS = {f"floor, {mode}": mode for mode in ("two-pass", "one-pass", "shared")}
OTHERS = [name for name in WAYS if name != "plain"]
# All ways at once where memory allows; of VGG-11 (532 MB of parameters) one beside the plain module. How our hook does
# there is in bench_hook.py.
GROUPS = {
    "resnet50": [["plain", *OTHERS]],
    "vgg11": [["plain", name] for name in OTHERS if name != "DDP + our hook"],
}
STEPS = {"resnet50": 2, "vgg11": 1}  # of a block
QUICK_GROUPS = {"resnet50": [["plain", "DDP (gloo)", "aggregator, eager"]]}


@dataclass
class Measured:
    """Of one model, collected group by group."""

    samples: dict[str, Samples] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    overhead_us: dict[str, float] = field(default_factory=dict)
    phases_us: dict[str, dict[str, float]] = field(default_factory=dict)
    exposed_us: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0

    def add_ways(
        self, ranks: RankSet, model: str, names: list[str], batch: int, blocks: int
    ) -> None:
        training = Training(ranks, model, names, batch)
        try:
            samples = interleave([training], blocks, 0.0, STEPS[model])
        finally:
            training.close()
        for name, found in samples.items():
            self.overhead_us[name] = overhead_us(found, samples["plain"])
            self._merge(name, found)
        self.missing |= training.missing
        self.losses |= training.first_losses()
        self.phases_us |= training.phases_us(blocks)
        self.exposed_us |= training.exposed_us(blocks)
        self.peak_rss_bytes = max(self.peak_rss_bytes, training.peak_rss_bytes())

    def add_floors(self, nbytes: int, blocks: int) -> None:
        program = floor_program("update")
        floors = [Program([label], program, mode, RANKS, nbytes) for label, mode in FLOORS.items()]
        try:
            for name, found in interleave(floors, blocks, 0.0, 3).items():
                self._merge(name, found)
        finally:
            for floor in floors:
                floor.close()

    def _merge(self, name: str, found: Samples) -> None:
        kept = self.samples.setdefault(name, Samples())
        kept.blocks += found.blocks
        kept.rank0 += found.rank0
        kept.wrong += found.wrong

    def extra(self) -> dict[str, Any]:
        return {
            "overhead_us": self.overhead_us,
            "phases_us": self.phases_us,
            "exposed_us": self.exposed_us,
            "peak_rss_bytes": self.peak_rss_bytes,
        }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    models = QUICK_GROUPS if metafunc.config.getoption("quick") else GROUPS
    metafunc.parametrize("measured", list(models), indirect=True, scope="module")


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest,
    rank_sets: RankSets,
    book: Book,
    blocks: int,
    quick: bool,
    batch: int,
) -> Measured:
    model: str = request.param
    found = Measured()
    (ranks,) = rank_sets.of(RANKS, "torch")
    for names in (QUICK_GROUPS if quick else GROUPS)[model]:
        found.add_ways(ranks, model, names, batch, blocks)
    nbytes = sum(4 * p.numel() for p in MODELS[model]().parameters())
    found.add_floors(nbytes, 1 if quick else blocks)
    book.add(
        "step",
        found.samples,
        missing=found.missing,
        extra=found.extra() | {"parameter_bytes": nbytes},
        model=model,
        ranks=RANKS,
        batch=batch,
    )
    return found


@pytest.mark.parametrize("method", [*WAYS, *FLOORS])
def test_step(
    measured: Measured,
    method: str,
    replay: Callable[[str, Samples], None],
    request: pytest.FixtureRequest,
) -> None:
    if method not in measured.samples:
        pytest.skip(measured.missing.get(method, "not in this run"))
    replay(f"step, {request.node.callspec.params['measured']}", measured.samples[method])
    assert measured.samples[method].wrong == 0  # the ranks' parameters are equal, bit by bit
    if method in measured.losses:  # and training goes where DDP's goes
        assert measured.losses[method] == pytest.approx(measured.losses["DDP (gloo)"], rel=1e-3)
