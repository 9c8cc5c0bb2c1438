"""One iteration's record, and the report made of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from pyallreduce import _core

if TYPE_CHECKING:
    import torch

# Of _core.now_s; on a GPU a mark on its stream, whose time is known once the device has passed it.
Time: TypeAlias = "float | _core.Mark"
Interval = tuple[float, float]
COMPUTE = ("forward", "backward", "update")  # phases in which the training thread computes


@dataclass(frozen=True)
class BucketTimes:
    """When one bucket went through its stations; seconds of ``_core.now_s``."""

    index: int
    nbytes: int
    params: list[str]
    ready_s: float  # its last gradient was written
    enqueued_s: float
    start_s: float
    end_s: float
    used_s: float  # the training thread first wanted the result
    arrivals_s: list[float]  # [size]: when each rank came to the collective; empty if unknown


class NonFinite(NamedTuple):
    """Where the aggregated gradients first held inf or NaN, in the order of buckets and of gradients in them."""

    rank: int | None  # whose gradient it was; None: every rank's is finite, their sum is not
    parameter: str


@dataclass(frozen=True)
class Iteration:
    """What happened from the first forward to the return of ``step()``, on one rank."""

    number: int
    start_s: float
    end_s: float
    phases: list[tuple[str, float, float]]  # name, start, end
    buckets: list[BucketTimes]
    nonfinite: NonFinite | None = None
    grad_norm: float | None = None


@dataclass
class BucketRecord:
    """A bucket whose collective has been submitted."""

    index: int
    nbytes: int
    params: list[str]
    ready_s: Time
    work: _core.Work | _core.DeviceWork
    used_s: Time = 0.0

    def finished(self) -> BucketTimes:
        """Valid once the work is done."""
        enqueued_s, start_s, end_s, arrivals_s = self.work.times()
        assert start_s is not None
        assert end_s is not None
        return BucketTimes(
            self.index,
            self.nbytes,
            self.params,
            seconds_of(self.ready_s),
            enqueued_s,
            start_s,
            end_s,
            seconds_of(self.used_s),
            arrivals_s,
        )


@dataclass
class IterationRecord:
    """An iteration that is still running."""

    iteration: int
    start_s: Time
    end_s: Time = 0.0
    phases: list[tuple[str, Time, Time]] = field(default_factory=list)
    buckets: list[BucketRecord] = field(default_factory=list)
    nonfinite: NonFinite | None = None
    # Before clipping, over all parameters; None unless measured.
    grad_norm: float | torch.Tensor | None = None

    def add(self, phase: str, start_s: Time, end_s: Time) -> None:
        self.phases.append((phase, start_s, end_s))

    def is_over(self) -> bool:
        """Also on the device, if it is there that the iteration runs."""
        return isinstance(self.end_s, float) or self.end_s.passed_s() is not None

    def finished(self) -> Iteration:
        """Valid once the iteration is over."""
        norm = None if self.grad_norm is None else float(self.grad_norm)
        return Iteration(
            self.iteration,
            seconds_of(self.start_s),
            seconds_of(self.end_s),
            [(name, seconds_of(start), seconds_of(end)) for name, start, end in self.phases],
            [bucket.finished() for bucket in self.buckets],
            self.nonfinite,
            norm if norm is not None and math.isfinite(norm) else None,
        )


def seconds_of(time: Time) -> float:
    if isinstance(time, float):
        return time
    passed_s = time.passed_s()
    assert passed_s is not None
    return passed_s


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


def difference(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """What of ``a`` lies outside ``b``; both as ``union`` returns them."""
    ends = [float("-inf"), *(time for interval in b for time in interval), float("inf")]
    return intersection(a, list(zip(ends[::2], ends[1::2], strict=True)))


def computing(iteration: Iteration) -> list[Interval]:
    """C: union of forward, backward and update."""
    return union([(start, end) for name, start, end in iteration.phases if name in COMPUTE])


def communicating(iteration: Iteration, size: int) -> list[Interval]:
    """M: union over the buckets of [start, end] of their collective; empty for one rank, who sends nothing."""
    return union([(b.start_s, b.end_s) for b in iteration.buckets]) if size > 1 else []


def skew(iteration: Iteration, size: int) -> list[float]:
    """[r]: seconds that rank r waited for the last rank to come, over all buckets. The straggler has the least."""
    rows = [bucket.arrivals_s for bucket in iteration.buckets if bucket.arrivals_s]
    return [sum(max(row) - row[r] for row in rows) for r in range(size)]


def summarise(iteration: Iteration | None, size: int) -> dict[str, Any]:
    """The report of one iteration; see GradientAggregator.report.

    With C and M as above: compute_s = |C|, comm_busy_s = |M|, exposed_comm_s = |M minus C|, overlap_ratio = |M and C|
    / |M| (None if |M| is 0), and idle_s is the rest: window_s = compute_s + exposed_comm_s + idle_s.
    """
    if iteration is None:
        iteration = Iteration(number=0, start_s=0.0, end_s=0.0, phases=[], buckets=[])
    zero = iteration.start_s
    compute, comm = computing(iteration), communicating(iteration, size)
    busy_s, hidden_s = length(comm), length(intersection(comm, compute))
    skew_s = skew(iteration, size)
    return {
        "iteration": iteration.number,
        "window_s": iteration.end_s - zero,
        "compute_s": length(compute),
        "comm_busy_s": busy_s,
        "exposed_comm_s": busy_s - hidden_s,
        "overlap_ratio": hidden_s / busy_s if comm else None,
        "idle_s": iteration.end_s - zero - length(union(compute + comm)),
        "skew_s": skew_s,
        "slowest_rank": skew_s.index(min(skew_s)),
        "buckets": [
            {
                "index": bucket.index,
                "bytes": bucket.nbytes,
                "params": bucket.params,
                "ready_s": bucket.ready_s - zero,
                "enqueued_s": bucket.enqueued_s - zero,
                "start_s": bucket.start_s - zero,
                "end_s": bucket.end_s - zero,
                "used_s": bucket.used_s - zero,
            }
            for bucket in iteration.buckets
        ],
        "phases": [
            {"name": name, "start_s": start - zero, "end_s": end - zero}
            for name, start, end in iteration.phases
        ],
        "nonfinite": iteration.nonfinite and iteration.nonfinite._asdict(),
        "grad_norm": iteration.grad_norm,
    }
