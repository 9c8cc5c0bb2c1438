"""The report: definitions to the last digit, and a straggler that is named."""

from __future__ import annotations

import itertools
import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pyallreduce as par
from pyallreduce.__main__ import main
from pyallreduce.report import (
    BucketTimes,
    Interval,
    Iteration,
    difference,
    intersection,
    length,
    summarise,
    union,
)
from ranks import run_ranks

ZERO_S = 1000.0  # times below are whole seconds after this: sums of them are exact


def bucket(
    index: int, ready: float, start: float, end: float, arrivals: list[float] | None = None
) -> BucketTimes:
    ready_s, start_s, end_s = ZERO_S + ready, ZERO_S + start, ZERO_S + end
    arrivals_s = [ZERO_S + arrival for arrival in arrivals or []]
    return BucketTimes(
        index, 4096, [f"p{index}"], ready_s, ready_s, start_s, end_s, end_s, arrivals_s
    )


def iteration(
    window: float, phases: list[tuple[str, float, float]], buckets: list[BucketTimes]
) -> Iteration:
    absolute = [(name, ZERO_S + start, ZERO_S + end) for name, start, end in phases]
    return Iteration(7, ZERO_S, ZERO_S + window, absolute, buckets)


def test_a_report_by_hand() -> None:
    #          0         1         2
    #          0123456789012345678901
    # compute  FFFFBBBBBB.......UU
    # waits              WWWWW
    # bucket 0        ====
    # bucket 1              ===
    phases = [
        ("forward", 0.0, 4.0),
        ("backward", 4.0, 10.0),
        ("wait", 10.0, 15.0),
        ("update", 17.0, 19.0),
    ]
    buckets = [bucket(0, 6, 7, 11, [7.0, 6.0, 9.0]), bucket(1, 10, 12, 15, [12.0, 13.0, 11.0])]
    report = summarise(iteration(20, phases, buckets), size=3)
    assert report["iteration"] == 7
    assert report["window_s"] == 20
    assert report["compute_s"] == 4 + 6 + 2
    assert report["comm_busy_s"] == 4 + 3
    assert report["exposed_comm_s"] == 1 + 3
    assert report["overlap_ratio"] == 3 / 7
    assert report["idle_s"] == 1 + 2 + 1  # between the buckets, before and after the update
    assert report["skew_s"] == [2 + 1, 3 + 0, 0 + 2]
    assert report["slowest_rank"] == 2
    assert report["buckets"][1] == {
        "index": 1,
        "bytes": 4096,
        "params": ["p1"],
        "ready_s": 10.0,
        "enqueued_s": 10.0,
        "start_s": 12.0,
        "end_s": 15.0,
        "used_s": 15.0,
    }
    assert report["phases"][3] == {"name": "update", "start_s": 17.0, "end_s": 19.0}


def test_what_is_undefined_is_none() -> None:
    alone = summarise(iteration(4, [("forward", 0, 2)], [bucket(0, 1, 2, 3, [2.0])]), size=1)
    assert (alone["comm_busy_s"], alone["overlap_ratio"], alone["idle_s"]) == (0, None, 2)
    silent = summarise(iteration(4, [("backward", 0, 2)], [bucket(0, 1, 1, 3)]), size=2)
    assert (silent["skew_s"], silent["overlap_ratio"]) == ([0, 0], 0.5)
    nothing = summarise(None, size=2)
    assert (nothing["iteration"], nothing["window_s"], nothing["buckets"]) == (0, 0, [])


SECONDS = st.integers(0, 30)
INTERVALS = st.lists(st.tuples(SECONDS, SECONDS).map(sorted).map(tuple), max_size=8)


def seconds_of(intervals: list[Interval]) -> set[int]:
    return {second for start, end in intervals for second in range(int(start), int(end))}


@given(INTERVALS, INTERVALS)
def test_intervals_are_sets(a: list[Interval], b: list[Interval]) -> None:
    one, other = union(a), union(b)
    assert seconds_of(one) == seconds_of(a)
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(one))
    assert length(one) == len(seconds_of(a))
    assert seconds_of(intersection(one, other)) == seconds_of(a) & seconds_of(b)
    assert seconds_of(difference(one, other)) == seconds_of(a) - seconds_of(b)
    assert union(difference(one, other)) == difference(one, other)


PHASES = st.tuples(st.sampled_from(["forward", "backward", "wait", "update"]), INTERVALS)


@given(st.lists(PHASES, max_size=4), INTERVALS, st.integers(2, 4))
def test_a_window_is_compute_exposed_communication_and_idle_time(
    phases: list[tuple[str, list[Interval]]], transfers: list[Interval], size: int
) -> None:
    """Against sets of whole seconds: C, M and what is left of the window."""
    record = iteration(
        30,
        [(name, start, end) for name, intervals in phases for start, end in intervals],
        [bucket(i, start, start, end) for i, (start, end) in enumerate(transfers)],
    )
    compute = seconds_of([i for name, found in phases if name != "wait" for i in found])
    comm = seconds_of(transfers)
    report = summarise(record, size)
    assert report["compute_s"] == len(compute)
    assert report["comm_busy_s"] == len(comm)
    assert report["exposed_comm_s"] == len(comm - compute)
    assert report["overlap_ratio"] == (len(comm & compute) / len(comm) if comm else None)
    assert report["idle_s"] == 30 - len(comm | compute)
    assert report["window_s"] == report["compute_s"] + report["exposed_comm_s"] + report["idle_s"]


# --- iterations ------------------------------------------------------------------------------------------------------


def test_an_update_that_is_no_step_ends_its_iteration_with_the_next_forward() -> None:
    """A replayed CUDA graph of step(), say: no hook of torch.optim sees it, and records must not pile up."""
    with closing(par.init()) as comm:
        model = nn.Linear(3, 2)
        aggregator = par.GradientAggregator(model, comm)
        for t in range(4):
            for _ in range(2):  # two forwards, one backward
                output = model(torch.ones(4, 3))
            output.sum().backward()
            report = aggregator.report()
            assert report["iteration"] == t
        assert [p["name"] for p in report["phases"]] == ["forward", "forward", "backward", "wait"]
        aggregator.close()


# --- a straggler -----------------------------------------------------------------------------------------------------

STRAGGLER, SLEEP_S, ITERATIONS = 2, 0.06, 5


def train_with_a_straggler(rank: int, n: int, update: str) -> list[dict[str, Any]]:
    comm = par.init(timeout_s=30)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 1))
    optimizer = par.SGD(model.parameters(), lr=0.01)
    aggregator = par.GradientAggregator(
        model, comm, bucket_bytes=4096, optimizer=optimizer, update=update
    )
    reports = []
    for _ in range(ITERATIONS):
        loss = model(torch.ones(4, 32)).mean()
        if rank == STRAGGLER:
            time.sleep(SLEEP_S)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        reports.append(aggregator.report())
    return reports  # neither closed: the process's end must be enough for the trace


@pytest.mark.parametrize("update", ["step", "eager"])
def test_the_straggler_is_named(
    update: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "trace")
    by_rank = run_ranks(4, train_with_a_straggler, update, env={"PYALLREDUCE_TRACE": folder})
    for reports in by_rank:
        assert statistics.mode(report["slowest_rank"] for report in reports) == STRAGGLER
        assert [r["skew_s"] for r in reports] == [r["skew_s"] for r in by_rank[0]]
        assert len(reports[0]["buckets"]) > 1
    for rank in range(4):
        waited_s = statistics.median(report["skew_s"][rank] for report in by_rank[0])
        assert (waited_s < SLEEP_S / 2) == (rank == STRAGGLER)
    assert main(["trace", folder]) == 0
    printed = capsys.readouterr().out
    assert f"slowest rank: {STRAGGLER}, the last in " in printed
    assert f"of {ITERATIONS} iterations" in printed
    assert [line.split()[:2] for line in printed.splitlines()[2:6]] == [
        [str(rank), str(ITERATIONS)] for rank in range(4)
    ]
