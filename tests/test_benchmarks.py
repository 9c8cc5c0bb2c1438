"""The benchmarks measure what they say: their checks notice wrong data, floors are right, bars are judged right."""

from __future__ import annotations

import json
import operator
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import report
from benchmarks.collectives import BACK_TO_BACK, FLOORS, Case, Collective, Pattern
from benchmarks.harness import Block, Book, Samples, interleave, markdown, size_name, time_name
from benchmarks.native import Program, floor_program
from benchmarks.peers import RankError, RankSet
from benchmarks.training import NO_COMMUNICATION, Training, overhead_us

ROOT = Path(__file__).parent.parent
NBYTES = 200_000  # more than one tile, and no multiple of one


# --- data that cannot be right by accident ---------------------------------------------------------------------------


def reduced(size: int, call: int, numel: int = 3 * Pattern.TILE + 5) -> tuple[Pattern, np.ndarray]:
    """The sum of what ``size`` ranks write for ``call``."""
    patterns = [Pattern(rank, size) for rank in range(size)]
    data = np.zeros((size, numel), np.float32)
    for pattern, part in zip(patterns, data, strict=True):
        pattern.write(part, call)
    return patterns[0], data.sum(axis=0, dtype=np.float32)


@pytest.mark.parametrize("size", [2, 4])
def test_pattern_accepts_the_sum_and_counts_what_differs(size: int) -> None:
    pattern, data = reduced(size, call=7)
    assert pattern.count_wrong(data, 7) == 0
    data[[0, 20_000, -1]] += 1
    assert pattern.count_wrong(data, 7) == 3


def test_pattern_notices_old_misplaced_and_missing_data() -> None:
    pattern, data = reduced(2, call=7)
    assert pattern.count_wrong(data, 8) == data.size  # of the call before
    assert pattern.count_wrong(np.roll(data, 4096), 7) > 0.9 * data.size
    assert pattern.count_wrong(np.roll(data, Pattern.TILE), 7) > 0.9 * data.size
    Pattern(0, 2).write(data, 7)  # one rank's alone
    assert pattern.count_wrong(data, 7) > 0.9 * data.size


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "mode"),
    [*FLOORS.values(), *(("update", mode) for mode in ("two-pass", "one-pass", "shared"))],
)
@pytest.mark.parametrize(("ranks", "cold"), [(2, False), (2, True), (3, False), (4, False)])
def test_floors_are_right(program: str, mode: str, ranks: int, cold: bool) -> None:
    source = Program(["floor"], floor_program(program), mode, ranks, NBYTES, cold)
    try:
        for first in (0, 3):
            block = source.block("floor", calls=3, first=first)
            assert block.wrong == 0
            assert len(block.seconds) == len(block.rank0) == 3
            pairs = zip(block.rank0, block.seconds, strict=True)
            assert all(0 < rank0 <= slowest for rank0, slowest in pairs)
    finally:
        source.close()


class Fake:
    """Notes who was asked; every call takes as many seconds as its number."""

    def __init__(self, log: list[tuple[str, int]], *methods: str) -> None:
        self.methods = methods
        self._log = log

    def block(self, method: str, calls: int, first: int) -> Block:
        self._log.append((method, calls))
        seconds = [float(first + i) for i in range(calls)]
        return Block(seconds, seconds, wrong=1, wall_s=0.1 * calls)


def test_sources_take_turns_and_warm_up() -> None:
    log: list[tuple[str, int]] = []
    samples = interleave([Fake(log, "a", "b"), Fake(log, "c")], blocks=3, block_s=0.65, min_calls=2)
    there, back = ["a", "b", "c"], ["c", "b", "a"]
    assert [method for method, _ in log] == back + there + back + there + back
    assert [calls for _, calls in log] == [2] * 6 + [6] * 9  # fitted in the second block
    assert [block[0] for block in samples["a"].blocks] == [4.0, 10.0, 16.0]  # no call twice
    assert samples["a"].wrong == 5  # that of warm-up counts, too


@pytest.fixture(scope="module")
def torch_ranks() -> Iterator[RankSet]:
    ranks = RankSet("torch", 2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("cache", ["hot", "cold", BACK_TO_BACK])
def test_ours_and_gloo_are_right(torch_ranks: RankSet, cache: str) -> None:
    source = Collective(torch_ranks, Case(2, NBYTES, cache))
    for method, found in interleave([source], 2, 0.0, 2).items():
        assert found.wrong == 0, method
        assert [len(block) for block in found.blocks] == [2, 2]


def test_a_failing_rank_is_named_and_takes_the_set_along() -> None:
    ranks = RankSet("torch", 2)
    assert ranks.call(operator.attrgetter("rank")) == [0, 1]
    with pytest.raises(RankError, match=r"(?s)rank [01] of torch.*AttributeError"):
        ranks.call(operator.attrgetter("nothing"))
    for pid in ranks.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_ways_to_train_agree(torch_ranks: RankSet) -> None:
    names = ["plain", "DDP (gloo)", "DDP + our hook", "aggregator, step", "aggregator, eager"]
    training = Training(torch_ranks, "mlp", names, batch=2)
    try:
        samples = interleave([training], 2, 0.0, 2)
        losses = training.first_losses()
        phases = training.phases_us(2)
        assert training.exposed_us(2).keys() == {"aggregator, step", "aggregator, eager"}
    finally:
        training.close()
    for name in names[1:]:
        assert samples[name].wrong == 0, name  # equal parameters on both ranks
        assert losses[name] == pytest.approx(losses["DDP (gloo)"], rel=1e-3)
        assert sum(phases[name].values()) == pytest.approx(samples[name].median * 1e6, rel=0.9)
    assert phases["plain"].keys() == {"forward", "backward"}


# --- figures ---------------------------------------------------------------------------------------------------------


def test_quantiles_are_samples() -> None:
    samples = Samples([[1.0, 2.0, 3.0], [4.0, 100.0]])
    assert (samples.median, samples.quantile(0.99), samples.quantile(0.1)) == (3.0, 100.0, 1.0)


def test_overhead_pairs_blocks_so_that_drift_cancels() -> None:
    base = Samples([[1.0, 1.0], [5.0, 5.0], [9.0, 9.0]])
    way = Samples([[1.5, 1.5], [5.5, 5.5], [9.5, 9.5]])
    assert overhead_us(way, base) == pytest.approx(0.5e6)


def all_reduce(book: Book, ours_us: float, commit: str = "a") -> dict[str, Any]:
    book.machine["commit"] = commit
    times = {"symmetric": ours_us, "gloo": 16.0, "openmpi": 4.0, "floor": 1.0}
    samples = {name: Samples([[us * 1e-6]]) for name, us in times.items()}
    case = {"ranks": 2, "bytes": 25 << 20, "cache": "hot", "dtype": "float32", "op": "sum"}
    return book.add("all_reduce", samples, missing={"mpich": "not installed"}, **case)


def first_row(book: Book) -> list[str]:
    return report.rows_of(book)[0].cells()


def test_bars_are_judged(tmp_path: Path) -> None:
    book = Book(tmp_path, [], blocks=1)
    assert first_row(book)[-1] == "not measured"
    all_reduce(book, ours_us=1.0)
    assert first_row(book)[3:] == ["16.0 x gloo; 4.0 x openmpi; 1.00 x floor", "yes"]
    all_reduce(book, ours_us=1.19)
    assert first_row(book)[-1] == "no: >= 16 x gloo; >= 3.5 x best MPI"
    all_reduce(book, ours_us=1.21)
    assert first_row(book)[-1] == "no: >= 16 x gloo; >= 3.5 x best MPI; <= 1.2 x floor"


def test_a_hook_is_judged_also_without_its_floor(tmp_path: Path) -> None:
    """Which older records lack."""
    book = Book(tmp_path, [], blocks=1)
    for floor, figure, found in (
        ({}, "800 ms", "20.0% shorter"),
        (
            {NO_COMMUNICATION: 0.5},
            "800 ms (without communication 500 ms)",
            "20.0% shorter; 1.60 x without communication",
        ),
    ):
        seconds = {"DDP + our hook": 0.8, "DDP (gloo)": 1.0, **floor}
        samples = {way: Samples([[s]]) for way, s in seconds.items()}
        book.add("hook", samples, extra={"gain_us": 2e5}, model="resnet50", ranks=2, batch=4)
        rows = [row.cells() for row in report.rows_of(book)]
        (cells,) = (
            row for row in rows if row[0] == "DDP with our hook against DDP (gloo), resnet50"
        )
        assert cells[2:] == [figure, found, "yes"]


def test_a_new_record_replaces_that_of_its_case(tmp_path: Path) -> None:
    for commit, us in (("a", 1.0), ("b", 2.0)):
        book = Book(tmp_path, ["--quick"], blocks=1)
        all_reduce(book, us, commit)
        book.add("fingerprint", {"fingerprint": Samples([[1e-8]])}, ranks=2)
    lines = [json.loads(line) for line in book.path.read_text().splitlines()]
    assert [line["benchmark"] for line in lines] == ["all_reduce", "fingerprint"]
    assert lines[0]["methods"]["symmetric"]["median_us"] == 2.0
    # busbw of 2 ranks is algbw: bytes over time.
    assert lines[0]["methods"]["symmetric"]["busbw_gb_s"] == pytest.approx((25 << 20) / 2e-6 / 1e9)
    text = report.markdown_of(book)
    assert "Commit b." in text
    assert "**Not measured: mpich**: not installed" in text


def test_words() -> None:
    assert [size_name(n) for n in (512, 4 << 10, 25 << 20)] == ["512 B", "4 KiB", "25 MiB"]
    names = [time_name(us) for us in (0.0123, 4.987, 12.3, 999.0, 1234.0, 123456.0)]
    assert names == ["12.3 ns", "4.99 us", "12.3 us", "999 us", "1.23 ms", "123 ms"]
    assert markdown(["a", "b"], [["1", "2"]]) == ["| a | b |", "|---|---|", "| 1 | 2 |"]


def test_the_suite_writes_lines_table_and_pictures(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_collectives.py", "--quick"]
    command += ["-k", "2-ranks-4KiB-hot", "--blocks=1", "-p", "no:cacheprovider"]
    command += [f"--results={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    (lines,) = tmp_path.glob("*.jsonl")
    (record,) = map(json.loads, lines.read_text().splitlines())
    assert {"symmetric", "plain", "gloo", *FLOORS} <= record["methods"].keys()
    assert record["methods"].keys() | record["missing"].keys() >= {"mpich", "openmpi"}
    assert all(f"!!! {name} was not measured" in done.stdout for name in record["missing"])
    assert all(figures["wrong"] == 0 for figures in record["methods"].values())
    assert record["machine"]["commit"]
    assert (
        "| 4 KiB, 2 ranks, whole Python call, symmetric, after a barrier, slowest rank |"
        in done.stdout
    )
    assert lines.with_suffix(".md").read_text() in done.stdout
    assert {path.name for path in tmp_path.glob("*.png")} == {"busbw.png", "latency.png"}
