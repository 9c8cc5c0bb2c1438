"""One iteration's record, and the report made of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pyallreduce import _core

Interval = tuple[float, float]


@dataclass
class BucketRecord:
    """When one bucket went through its stations; seconds of ``_core.now_s``."""

    index: int
    nbytes: int
    params: list[str]
    ready_s: float
    work: _core.Work
    used_s: float = 0.0  # when the training thread first wanted the result


@dataclass
class IterationRecord:
    """What happened from the first forward to the return of ``step()``, on one rank."""

    iteration: int
    start_s: float
    end_s: float = 0.0
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    buckets: list[BucketRecord] = field(default_factory=list)

    def add(self, phase: str, start_s: float, end_s: float) -> None:
        self.phases.append((phase, start_s, end_s))


def union(intervals: list[Interval]) -> list[Interval]:
    """Disjoint intervals, ascending, that cover the same time."""
    merged: list[Interval] = []
    for start, end in sorted(i for i in intervals if i[0] < i[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(intervals: list[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def intersection(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """Of two lists as ``union`` returns them."""
    return union([(max(s, t), min(e, f)) for s, e in a for t, f in b])


def summarise(record: IterationRecord | None, size: int) -> dict[str, Any]:
    """The report of one iteration; see GradientAggregator.report.

    C: union of forward, backward and update; M: union over buckets of [start, end] of their collective.
    comm_busy_s = |M|, exposed_comm_s = |M minus C|, overlap_ratio = |M and C| / |M|, None if |M| is 0 (size 1).
    skew_s[r]: how much earlier than the last rank r arrived, mean over the buckets; the slowest has the least.
    """
    if record is None:
        record = IterationRecord(iteration=0, start_s=0.0)
    zero = record.start_s
    busy = union(
        [(s, e) for name, s, e in record.phases if name in ("forward", "backward", "update")]
    )
    times = [bucket.work.times() for bucket in record.buckets]
    comm = union([(start, end) for _, start, end, _ in times]) if size > 1 else []
    hidden = length(intersection(comm, busy))
    lateness = [[max(arrivals) - t for t in arrivals] for *_, arrivals in times]
    skew = [
        sum(row[r] for row in lateness) / len(lateness) if lateness else 0.0 for r in range(size)
    ]
    return {
        "iteration": record.iteration,
        "window_s": record.end_s - zero,
        "compute_s": length(busy),
        "comm_busy_s": length(comm),
        "exposed_comm_s": length(comm) - hidden,
        "overlap_ratio": hidden / length(comm) if comm else None,
        "skew_s": skew,
        "slowest_rank": skew.index(min(skew)),
        "buckets": [
            {
                "index": bucket.index,
                "bytes": bucket.nbytes,
                "params": bucket.params,
                "ready_s": bucket.ready_s - zero,
                "enqueued_s": enqueued - zero,
                "start_s": start - zero,
                "end_s": end - zero,
                "used_s": bucket.used_s - zero,
            }
            for bucket, (enqueued, start, end, _) in zip(record.buckets, times, strict=True)
        ],
        "phases": [
            {"name": name, "start_s": start - zero, "end_s": end - zero}
            for name, start, end in record.phases
        ],
    }
