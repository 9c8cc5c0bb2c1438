"""The event record on disk: what every rank's aggregators write when PYALLREDUCE_TRACE names a folder.

One file per rank, ``rank<r>.jsonl``, one JSON object per line:

- for every aggregator a header: format, rank, size, host, pid, the clock's identity, one moment on it and on the wall
  clock;
- for every bucket, before it is first mentioned: its bytes and the names of its parameters;
- for every finished iteration: when its phases and buckets began and ended, and when each rank came to a bucket's
  collective; seconds of CLOCK_MONOTONIC. About 0.2 KB + (0.15 + 0.015 x size) KB per bucket.

A process begins its file anew; aggregators of one process share it. Lines leave the process together, about once per
second and at its end, so that a killed rank loses at most those of the last second and half a line.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
import warnings
from dataclasses import dataclass, field
from multiprocessing import util
from pathlib import Path
from typing import Any

from pyallreduce import _core
from pyallreduce.errors import UsageError
from pyallreduce.report import BucketTimes, Iteration

FORMAT = 1
FLUSH_EVERY_S = 1.0
_files: dict[str, _RankFile] = {}


def open_trace(rank: int, size: int) -> TraceWriter | None:
    """The writer of one more aggregator of this process; None without PYALLREDUCE_TRACE.

    UsageError if the folder cannot be made or written.
    """
    folder = _core.read_env()["trace"]
    if not folder:
        return None
    path = os.path.join(os.path.abspath(folder), f"rank{rank}.jsonl")
    if path not in _files or _files[path].pid != os.getpid():
        _files[path] = _RankFile(path)
    return TraceWriter(_files[path], rank, size)


class _RankFile:
    """Collects lines and appends them to the file now and then."""

    def __init__(self, path: str) -> None:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            # O_APPEND: should two processes claim one rank, their lines mix but do not overwrite each other.
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
            self._fd = os.open(path, flags, 0o666)  # until the process ends
        except OSError as error:
            raise UsageError(f"PYALLREDUCE_TRACE: cannot write {path}: {error.strerror}") from error
        self.path, self.pid = path, os.getpid()
        self.num_aggregators = 0
        self._failed = False
        self._lines: list[str] = []
        self._lock = threading.Lock()
        self._flushed_s = _core.now_s()
        # Runs at the end of this process, and not of its forked children, which hold a copy of the lines.
        util.Finalize(None, self.flush, exitpriority=0)

    def append(self, line: str) -> None:
        with self._lock:
            self._lines.append(line)
        if _core.now_s() - self._flushed_s > FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        if os.getpid() != self.pid:
            return
        with self._lock:
            data, self._lines = "".join(self._lines).encode(), []
            self._flushed_s = _core.now_s()
            try:
                while data and not self._failed:
                    data = data[os.write(self._fd, data) :]
            except OSError as error:  # a full disk must not end a training
                self._failed = True
                text = f"the trace ends here: cannot write {self.path}: {error.strerror}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)


class TraceWriter:
    """Writes the iterations of one aggregator: 20 to 40 us each, with six buckets and up to eight ranks."""

    def __init__(self, file: _RankFile, rank: int, size: int) -> None:
        self._file = file
        self._aggregator = file.num_aggregators
        file.num_aggregators += 1
        self._described: set[int] = set()
        header = {
            "pyallreduce_trace": FORMAT,
            "aggregator": self._aggregator,
            "rank": rank,
            "size": size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "clock": _clock_identity(),
            "monotonic_s": _core.now_s(),
            "wall_s": time.time(),
        }
        file.append(json.dumps(header) + "\n")
        file.flush()

    def add(self, iteration: Iteration) -> None:
        for bucket in iteration.buckets:
            if bucket.index not in self._described:
                self._described.add(bucket.index)
                self._file.append(self._description_of(bucket))
        self._file.append(self._line_of(iteration))

    def flush(self) -> None:
        self._file.flush()

    def _description_of(self, bucket: BucketTimes) -> str:
        description = {
            "aggregator": self._aggregator,
            "bucket": bucket.index,
            "bytes": bucket.nbytes,
            "params": bucket.params,
        }
        return json.dumps(description) + "\n"

    def _line_of(self, iteration: Iteration) -> str:
        # Formatted by hand: three times as fast as json.dumps, on the training thread.
        phases = ",".join(['["%s",%.7f,%.7f]' % phase for phase in iteration.phases])  # noqa: UP031
        buckets = ",".join([_line_of_bucket(bucket) for bucket in iteration.buckets])
        return (
            f'{{"aggregator":{self._aggregator},"iteration":{iteration.number},"start_s":{iteration.start_s:.7f},'
            f'"end_s":{iteration.end_s:.7f},"phases":[{phases}],"buckets":[{buckets}]}}\n'
        )


def _line_of_bucket(bucket: BucketTimes) -> str:
    arrivals = ",".join(["%.7f" % time_s for time_s in bucket.arrivals_s])  # noqa: UP031
    return (
        f'{{"index":{bucket.index},"ready_s":{bucket.ready_s:.7f},"enqueued_s":{bucket.enqueued_s:.7f},'
        f'"start_s":{bucket.start_s:.7f},"end_s":{bucket.end_s:.7f},"used_s":{bucket.used_s:.7f},'
        f'"arrivals_s":[{arrivals}]}}'
    )


def _clock_identity() -> str:
    """Equal for processes that read the same CLOCK_MONOTONIC: those of one boot and one time namespace."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}/{os.stat('/proc/self/ns/time').st_ino}"


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass
class RankTrace:
    """One rank's file."""

    path: Path
    rank: int
    size: int
    host: str
    pid: int
    clock: str
    wall_minus_monotonic_s: float
    iterations: dict[int, list[Iteration]] = field(default_factory=dict)  # by aggregator
    truncated: bool = False  # the last line is incomplete


def read_rank(path: Path) -> RankTrace | None:
    """None if there is no complete line. UsageError if a line cannot be understood."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    complete, _, rest = data.rpartition(b"\n")
    if not complete:
        return None
    reader = _Reader(path)
    for number, line in enumerate(complete.split(b"\n"), start=1):
        reader.take(number, line)
    assert reader.trace is not None
    reader.trace.truncated = bool(rest)
    return reader.trace


class _Reader:
    def __init__(self, path: Path) -> None:
        self.trace: RankTrace | None = None
        self._path = path
        self._descriptions: dict[tuple[int, int], tuple[int, list[str]]] = {}

    def take(self, number: int, line: bytes) -> None:
        try:
            self._understand(json.loads(line))
        except UsageError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UsageError(
                f"{self._path}, line {number}: not a record of a pyallreduce trace ({error!r})"
            ) from error

    def _understand(self, record: dict[str, Any]) -> None:
        if "pyallreduce_trace" in record:
            self._begin(record)
        elif self.trace is None:
            raise ValueError("there is no header before it")
        elif "bucket" in record:
            key = (record["aggregator"], record["bucket"])
            self._descriptions[key] = (int(record["bytes"]), list(record["params"]))
        else:
            self.trace.iterations[record["aggregator"]].append(self._iteration(record))

    def _begin(self, header: dict[str, Any]) -> None:
        if header["pyallreduce_trace"] != FORMAT:
            raise UsageError(
                f"{self._path} has format {header['pyallreduce_trace']}, this version reads {FORMAT}"
            )
        if not 0 <= header["rank"] < header["size"]:
            raise ValueError("0 <= rank < size does not hold")
        trace = RankTrace(
            path=self._path,
            rank=int(header["rank"]),
            size=int(header["size"]),
            host=str(header["host"]),
            pid=int(header["pid"]),
            clock=str(header["clock"]),
            wall_minus_monotonic_s=_seconds(header["wall_s"]) - _seconds(header["monotonic_s"]),
        )
        if self.trace is None:
            self.trace = trace
        if (trace.pid, trace.size) != (self.trace.pid, self.trace.size):
            raise UsageError(
                f"{self._path} was written by two communicators' rank {trace.rank}: processes {self.trace.pid} "
                f"(of {self.trace.size} ranks) and {trace.pid} (of {trace.size}). Give each run, and each subgroup, a "
                "folder of its own"
            )
        self.trace.iterations[int(header["aggregator"])] = []

    def _iteration(self, record: dict[str, Any]) -> Iteration:
        phases = [
            (str(name), _seconds(start), _seconds(end)) for name, start, end in record["phases"]
        ]
        buckets = [self._bucket(record["aggregator"], bucket) for bucket in record["buckets"]]
        return Iteration(
            int(record["iteration"]),
            _seconds(record["start_s"]),
            _seconds(record["end_s"]),
            phases,
            buckets,
        )

    def _bucket(self, aggregator: int, record: dict[str, Any]) -> BucketTimes:
        assert self.trace is not None
        arrivals_s = [_seconds(arrival_s) for arrival_s in record["arrivals_s"]]
        if len(arrivals_s) not in (0, self.trace.size):
            raise ValueError(f"{len(arrivals_s)} ranks arrived")
        return BucketTimes(
            int(record["index"]),
            *self._descriptions[aggregator, record["index"]],
            ready_s=_seconds(record["ready_s"]),
            enqueued_s=_seconds(record["enqueued_s"]),
            start_s=_seconds(record["start_s"]),
            end_s=_seconds(record["end_s"]),
            used_s=_seconds(record["used_s"]),
            arrivals_s=arrivals_s,
        )


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError(f"{value} is no time")
    return seconds
