"""``pyallreduce trace``: merge the ranks' event records into one timeline, and say what they show."""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pyallreduce import __version__
from pyallreduce.errors import UsageError
from pyallreduce.report import (
    BucketTimes,
    Interval,
    Iteration,
    communicating,
    computing,
    difference,
    skew,
    summarise,
)
from pyallreduce.trace import RankTrace, read_rank

DESCRIPTION = """\
Merges the files that PYALLREDUCE_TRACE=DIR made every rank write into one trace for https://ui.perfetto.dev or
chrome://tracing, and prints a summary. One process per rank; its lanes are what the training thread computed, the
communication that nothing hid, and every bucket: queue (ready to start), transfer (start to end), and within a transfer
the wait for the last rank. Arrows lead from the gradient through the transfer to its use.

Summary: exposed is communication that no forward, backward or update hid, overlap the share of it that one did; skew is
how long a rank waited in its collectives for the last one to come: the straggler has the least.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="what PYALLREDUCE_TRACE named")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="trace.json, or trace.json.gz to compress it (default: DIR/trace.json)",
    )


def run(options: argparse.Namespace) -> int:
    """Returns 0; raises UsageError where the files give no trace."""
    ranks = read_folder(options.folder)
    output: Path = options.output or options.folder / "trace.json"
    write(output, timeline(ranks))
    print(summary(ranks))
    print(f"wrote {output}; open it with https://ui.perfetto.dev or chrome://tracing")
    return 0


# --- reading ---------------------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> list[RankTrace]:
    """The ranks' files in rank order. Says on stderr what is missing; UsageError if they are not of one run."""
    paths = sorted(folder.glob("rank*.jsonl"))
    if not paths:
        raise UsageError(
            f"{folder} holds no rank*.jsonl; run the training with PYALLREDUCE_TRACE={folder} first"
        )
    ranks: list[RankTrace] = []
    for path in paths:
        if (rank := read_rank(path)) is None:
            note(f"{path.name} holds nothing yet; left out")
            continue
        if rank.truncated:
            note(f"{path.name}: the last line is incomplete (was the rank killed?); left out")
        ranks.append(rank)
    ranks.sort(key=lambda rank: rank.rank)
    check_one_run(ranks)
    if not any(iterations for rank in ranks for iterations in rank.iterations.values()):
        raise UsageError(f"{folder}: no rank has finished an iteration")
    absent = set(range(ranks[0].size)) - {rank.rank for rank in ranks}
    if absent:
        note(f"nothing of rank(s) {listed(absent)} of {ranks[0].size}: the picture has gaps")
    return ranks


def check_one_run(ranks: list[RankTrace]) -> None:
    """Files of one run tell the same about when each rank came to a collective; those of two runs never do."""
    remedy = "Give each run a folder of its own, or remove the old files"
    for one, other in itertools.pairwise(ranks):
        names = f"{one.path.name} and {other.path.name}"
        if one.rank == other.rank:
            raise UsageError(f"{names} are both of rank {one.rank}. {remedy}")
        if one.size != other.size:
            raise UsageError(
                f"{names} are of different runs, with {one.size} and {other.size} ranks. {remedy}"
            )
        rebooted = one.host == other.host and one.clock != other.clock
        if rebooted or (one.clock == other.clock and contradict(one, other)):
            raise UsageError(f"{names} are of different runs. {remedy}")


def contradict(one: RankTrace, other: RankTrace) -> bool:
    theirs = dict(arrivals_of(other))
    return any(theirs.get(key, arrivals_s) != arrivals_s for key, arrivals_s in arrivals_of(one))


def arrivals_of(rank: RankTrace) -> Iterator[tuple[tuple[int, int, int], list[float]]]:
    """By aggregator, iteration and bucket."""
    for aggregator, iterations in rank.iterations.items():
        for iteration in iterations:
            for bucket in iteration.buckets:
                yield (aggregator, iteration.number, bucket.index), bucket.arrivals_s


def note(text: str) -> None:
    print(f"pyallreduce trace: {text}", file=sys.stderr)


def listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


# --- the timeline ----------------------------------------------------------------------------------------------------


def timeline(ranks: list[RankTrace]) -> dict[str, Any]:
    """The ranks as an object of Chrome's trace event format. Microseconds from the first event, on one clock."""
    shifts = clock_shifts(ranks)
    zero = min(
        iteration.start_s + shift_s
        for rank, shift_s in zip(ranks, shifts, strict=True)
        for iterations in rank.iterations.values()
        for iteration in iterations
    )
    flow_ids = itertools.count()
    events: list[dict[str, Any]] = []
    for rank, shift_s in zip(ranks, shifts, strict=True):
        events += RankEvents(rank, shift_s - zero, flow_ids).events
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "distributedInfo": {
            "backend": "pyallreduce",
            "rank": ranks[0].rank,
            "world_size": ranks[0].size,
            "merged_ranks": [rank.rank for rank in ranks],
        },
        "otherData": {"pyallreduce": __version__, "clock": clock_note(ranks)},
    }


def clock_shifts(ranks: list[RankTrace]) -> list[float]:
    """Seconds to add to each rank's times to have them on the first rank's clock."""
    first = ranks[0]
    return [
        0.0
        if rank.clock == first.clock
        else rank.wall_minus_monotonic_s - first.wall_minus_monotonic_s
        for rank in ranks
    ]


def clock_note(ranks: list[RankTrace]) -> str:
    shifted = [r for r in ranks if r.clock != ranks[0].clock]
    if not shifted:
        return "CLOCK_MONOTONIC, which the ranks of one host share"
    return (
        f"CLOCK_MONOTONIC of {ranks[0].host}; that of rank(s) {listed(r.rank for r in shifted)} was shifted by the "
        "difference of the wall clocks, whose error (milliseconds with NTP) moves these ranks against the others"
    )


class RankEvents:
    """The events of one rank, on lanes (tid): computing, exposed communication, then one per bucket."""

    COMPUTE, EXPOSED, FIRST_BUCKET = 1, 2, 3  # viewers give thread 0 a meaning of its own

    def __init__(self, rank: RankTrace, shift_s: float, flow_ids: Iterator[int]) -> None:
        self._rank, self._shift_s, self._flow_ids = rank, shift_s, flow_ids
        self._lanes: dict[int, str] = {}
        self.events: list[dict[str, Any]] = []
        buckets = [b.index for _, i in self._iterations() for b in i.buckets]
        stride = self.FIRST_BUCKET + max(buckets, default=-1) + 1
        for aggregator, iteration in self._iterations():
            self._add_iteration(aggregator, aggregator * stride, iteration)
        self._name_process()

    def _iterations(self) -> Iterator[tuple[int, Iteration]]:
        for aggregator, iterations in self._rank.iterations.items():
            yield from ((aggregator, iteration) for iteration in iterations)

    def _add_iteration(self, aggregator: int, first_lane: int, iteration: Iteration) -> None:
        several = f"aggregator {aggregator}: " if len(self._rank.iterations) > 1 else ""
        compute = first_lane + self.COMPUTE
        self._lanes[compute] = f"{several}compute"
        self._lanes[first_lane + self.EXPOSED] = f"{several}exposed communication"
        report = summarise(iteration, self._rank.size)
        arguments = {
            key: report[key] for key in ("exposed_comm_s", "overlap_ratio", "idle_s", "skew_s")
        }
        window = (iteration.start_s, iteration.end_s)
        self._slice(compute, f"iteration {iteration.number}", "iteration", window, **arguments)
        for name, start_s, end_s in iteration.phases:
            self._slice(compute, name, "compute", (start_s, end_s))
        exposed = difference(communicating(iteration, self._rank.size), computing(iteration))
        for interval in exposed:
            self._slice(first_lane + self.EXPOSED, "exposed", "exposed", interval)
        for bucket in iteration.buckets:
            lane = first_lane + self.FIRST_BUCKET + bucket.index
            detail: dict[str, Any] = {"bytes": bucket.nbytes}
            if lane not in self._lanes:  # once: the names would be most of the file
                detail["params"] = bucket.params
            self._lanes[lane] = f"{several}bucket {bucket.index} ({megabytes(bucket.nbytes)})"
            self._add_bucket(bucket, lane, compute, detail)

    def _add_bucket(
        self, bucket: BucketTimes, lane: int, compute: int, detail: dict[str, Any]
    ) -> None:
        name = f"bucket {bucket.index}"
        self._slice(lane, f"queue {name}", "queue", (bucket.ready_s, bucket.start_s))
        transfer = (bucket.start_s, bucket.end_s)
        self._slice(lane, f"transfer {name}", "transfer", transfer, **detail)
        if bucket.arrivals_s:
            last_s = max(bucket.arrivals_s)
            last = bucket.arrivals_s.index(last_s)
            waiting = (bucket.start_s, min(last_s, bucket.end_s))
            if last != self._rank.rank:
                self._slice(lane, f"waits for rank {last}", "wait", waiting)
        flow: dict[str, Any] = {"cat": "bucket", "name": name, "id": next(self._flow_ids)}
        self._event("s", compute, bucket.ready_s, **flow)
        self._event("t", lane, bucket.start_s, **flow)
        self._event("f", compute, max(bucket.used_s, bucket.end_s), bp="e", **flow)

    def _slice(self, lane: int, name: str, category: str, interval: Interval, **args: Any) -> None:
        start_s, end_s = interval
        if start_s < end_s:
            self._event("X", lane, start_s, end_s, name=name, cat=category, args=args)

    def _event(
        self, kind: str, lane: int, at_s: float, end_s: float | None = None, **fields: Any
    ) -> None:
        at_us = self._microseconds(at_s)
        event = {"ph": kind, "pid": self._rank.rank, "tid": lane, "ts": at_us, **fields}
        if end_s is not None:
            event["dur"] = round(self._microseconds(end_s) - at_us, 3)
        self.events.append(event)

    def _microseconds(self, time_s: float) -> float:
        return round((time_s + self._shift_s) * 1e6, 3)

    def _name_process(self) -> None:
        rank = self._rank
        name = f"rank {rank.rank} of {rank.size} ({rank.host}, {rank.pid})"
        self._metadata("process_name", self.COMPUTE, name=name)
        self._metadata("process_sort_index", self.COMPUTE, sort_index=rank.rank)
        for lane, name in self._lanes.items():
            self._metadata("thread_name", lane, name=name)
            self._metadata("thread_sort_index", lane, sort_index=lane)

    def _metadata(self, kind: str, lane: int, **args: Any) -> None:
        event = {"ph": "M", "pid": self._rank.rank, "tid": lane, "name": kind, "args": args}
        self.events.append(event)


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 1 << 20 else f"{nbytes / 2**10:.1f} KiB"


def write(path: Path, trace: dict[str, Any]) -> None:
    """One event per line, so that grep finds it."""
    rest = {key: value for key, value in trace.items() if key != "traceEvents"}
    events = ",\n".join(json.dumps(event, allow_nan=False) for event in trace["traceEvents"])
    text = f'{json.dumps(rest, allow_nan=False)[:-1]}, "traceEvents": [\n{events}\n]}}\n'
    data = text.encode()
    try:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


# --- the summary -----------------------------------------------------------------------------------------------------

COLUMNS = "{:>5} {:>11} {:>11} {:>11} {:>11} {:>8} {:>10}"


def summary(ranks: list[RankTrace]) -> str:
    """Per rank the medians over its iterations, and who came last."""
    size, hosts = ranks[0].size, len({rank.host for rank in ranks})
    lines = [f"{len(ranks)} of {size} rank(s), {hosts} host(s); medians over the iterations"]
    aggregators = sorted({a for rank in ranks for a, found in rank.iterations.items() if found})
    for aggregator in aggregators:
        if len(aggregators) > 1:
            lines.append(f"aggregator {aggregator}")
        by_rank = {rank.rank: rank.iterations.get(aggregator, []) for rank in ranks}
        lines += summary_of_aggregator(by_rank, size)
    return "\n".join(lines)


def summary_of_aggregator(by_rank: dict[int, list[Iteration]], size: int) -> list[str]:
    skews = skew_of_iterations(by_rank, size)
    early_s = [statistics.median(column) for column in zip(*skews, strict=True)]
    lines = [
        COLUMNS.format(
            "rank", "iterations", "window_ms", "compute_ms", "exposed_ms", "overlap", "skew_ms"
        )
    ]
    for rank, iterations in by_rank.items():
        reports = [summarise(iteration, size) for iteration in iterations]
        lines.append(
            COLUMNS.format(
                rank,
                len(iterations),
                *(
                    median((report[key] for report in reports), "{:.3f}", 1e3)
                    for key in ("window_s", "compute_s", "exposed_comm_s")
                ),
                median((report["overlap_ratio"] for report in reports), "{:.2f}"),
                f"{1e3 * early_s[rank]:.3f}" if early_s else "-",
            )
        )
    if size > 1 and early_s:
        slowest = early_s.index(min(early_s))
        times = sum(row.index(min(row)) == slowest for row in skews)
        lines.append(
            f"slowest rank: {slowest}, the last in {times} of {len(skews)} iterations; "
            f"others wait up to {1e3 * max(early_s):.3f} ms for it"
        )
    return lines


def skew_of_iterations(by_rank: dict[int, list[Iteration]], size: int) -> list[list[float]]:
    """Each iteration's skew, from any rank that has finished it: they all know when the others came."""
    known = {
        iteration.number: skew(iteration, size)
        for iterations in by_rank.values()
        for iteration in iterations
        if any(bucket.arrivals_s for bucket in iteration.buckets)
    }
    return [known[number] for number in sorted(known)]


def median(values: Iterable[float | None], form: str, factor: float = 1.0) -> str:
    """Of those that are defined."""
    defined = [value for value in values if value is not None]
    return form.format(factor * statistics.median(defined)) if defined else "-"
