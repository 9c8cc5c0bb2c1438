"""``python -m pytest benchmarks``: one file per subject; the records, the table and the plots that come of a run.

All methods of a case are measured interleaved, by the first test of the case; the tests then replay the samples through
pytest-benchmark, so that its table, JSON and comparison work. They assert that results are right, never how fast.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import plots, report
from benchmarks.harness import HERE, ROOT, Book, Samples
from benchmarks.peers import RankSets

BLOCKS, QUICK_BLOCKS = 7, 2
BOOK = pytest.StashKey[Book]()
PROBLEMS = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pyallreduce")
    group.addoption(
        "--quick",
        action="store_true",
        help="few blocks, few cases: shows that it runs, proves no figure",
    )
    group.addoption(
        "--blocks",
        type=int,
        help=f"interleaved blocks of each case (default {BLOCKS}, quick {QUICK_BLOCKS})",
    )
    group.addoption(
        "--results",
        type=Path,
        help="folder of the results (default benchmarks/results; quick: build/bench/quick)",
    )
    group.addoption(
        "--batch", type=int, default=4, help="images per rank of the training steps (default 4)"
    )


def pytest_configure(config: pytest.Config) -> None:
    quick = config.getoption("quick")
    config.option.blocks = config.option.blocks or (QUICK_BLOCKS if quick else BLOCKS)
    folder = config.option.results or (
        ROOT / "build" / "bench" / "quick" if quick else HERE / "results"
    )
    config.stash[BOOK] = Book(folder, config.invocation_params.args, config.option.blocks)
    config.stash[PROBLEMS] = {}
    torch.set_num_threads(1)


# --- replay ----------------------------------------------------------------------------------------------------------

_shown_s = 0.0


def recorded_clock() -> float:
    """Of pytest-benchmark, instead of the time of day: moves by one sample per call."""
    return _shown_s


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=recorded_clock))


@pytest.fixture
def replay(benchmark: BenchmarkFixture) -> Callable[[str, Samples], None]:
    """Hands samples that have been measured to pytest-benchmark."""

    def run(group: str, samples: Samples) -> None:
        upcoming: Iterator[float] = iter(samples.all)

        def call() -> None:
            global _shown_s
            _shown_s += next(upcoming)

        benchmark.group = group
        benchmark.pedantic(call, rounds=len(samples.all))

    return run


# --- what the files share --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def book(request: pytest.FixtureRequest) -> Book:
    return request.config.stash[BOOK]


@pytest.fixture(scope="session")
def blocks(request: pytest.FixtureRequest) -> int:
    blocks: int = request.config.getoption("blocks")
    return blocks


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    quick: bool = request.config.getoption("quick")
    return quick


@pytest.fixture(scope="session")
def batch(request: pytest.FixtureRequest) -> int:
    batch: int = request.config.getoption("batch")
    return batch


@pytest.fixture(scope="module")
def rank_sets(request: pytest.FixtureRequest) -> Iterator[RankSets]:
    sets = RankSets(request.config.stash[PROBLEMS])
    yield sets
    sets.close()


# --- the outcome -----------------------------------------------------------------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    book = config.stash[BOOK]
    if not book.fresh:
        return
    for name, problem in config.stash[PROBLEMS].items():
        terminalreporter.write_line(f"!!! {name} was not measured: {problem}", red=True, bold=True)
    text = report.markdown_of(book)
    book.path.with_suffix(".md").write_text(text)
    folder = ROOT / "docs" if book.path.parent == HERE / "results" else book.path.parent
    pictures = plots.draw_all(book, folder)
    terminalreporter.section("figures")
    terminalreporter.write_line(text)
    for path in [book.path, book.path.with_suffix(".md"), *pictures]:
        terminalreporter.write_line(f"wrote {os.path.relpath(path)}")
