"""What a run measures about itself, and `metrics.jsonl`, where it is kept.

Throughput, overlap and exposed time are defined once for the project; here they are only collected.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyallreduce as par

SCHEMA = 1
# Allocations, thread start-up and the first touch of shared pages fall into the first iterations.
WARMUP_ITERATIONS = 20
# The speed on a log line is that of so many iterations: fewer jitter, more hide a change.
WINDOW = 20
# About 3 KB each; a run longer than this keeps its newest.
KEPT_REPORTS = 512


class MetricsFile:
    """Appends one JSON object per line and flushes it, so a killed run loses nothing it logged."""

    def __init__(self, path: Path | None, from_step: int) -> None:
        """Without a path (ranks other than 0) nothing is written.

        `from_step` 0 starts the file anew; otherwise records behind that iteration, which will be
        run again, are taken out.
        """
        self._earlier_s = 0.0
        self._file = None
        self._started = time.monotonic()
        if path is None:
            return
        kept = [r for r in read_metrics(path) if r["step"] <= from_step]
        if from_step and kept:
            self._earlier_s = kept[-1]["wall_s"]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(
            "".join(json.dumps(r) + "\n" for r in kept if from_step), encoding="utf-8"
        )
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    @property
    def wall_s(self) -> float:
        """Seconds of this run, those before a resume included."""
        return self._earlier_s + time.monotonic() - self._started

    def write(self, kind: str, **values: Any) -> None:
        if self._file:
            record = {"schema": SCHEMA, "kind": kind, "wall_s": round(self.wall_s, 4), **values}
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Meter:
    """Adds up one rank's iterations; nothing here communicates except `end_epoch`."""

    def __init__(self, comm: par.Communicator, aggregator: par.GradientAggregator, minibatch: int):
        self._comm = comm
        self._aggregator = aggregator
        self._minibatch = minibatch
        self._data_s: deque[float] = deque(maxlen=KEPT_REPORTS)
        self._step_s: deque[float] = deque(maxlen=KEPT_REPORTS)
        self.reports: deque[dict[str, Any]] = deque(maxlen=KEPT_REPORTS)
        self.steps = 0
        self._started = time.perf_counter()
        self._began_s: float | None = None  # the iteration, by asking for its first images
        self._waited_s = 0.0
        self._sums = _no_images()  # of the epoch
        self._latest = _no_images()  # of the iteration

    def timed(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, with the time spent waiting for each of them taken."""
        source = iter(batches)
        while True:
            asked = time.perf_counter()
            if self._began_s is None:
                self._began_s = asked
            batch = next(source, None)
            if batch is None:
                return
            self._waited_s += time.perf_counter() - asked
            yield batch

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, total: int) -> None:
        """After a backward: `loss` is the sum over the labels divided by `total`, as differentiated."""
        self._latest += torch.stack(
            [
                loss.detach().double() * total,
                (logits.detach().argmax(1) != labels).sum().double(),
                torch.tensor(len(labels), dtype=torch.float64),
            ]
        )

    def end_iteration(self) -> None:
        """After the update."""
        assert self._began_s is not None
        self._data_s.append(self._waited_s)
        self._step_s.append(time.perf_counter() - self._began_s - self._waited_s)
        self._began_s, self._waited_s = None, 0.0
        self.steps += 1
        self._sums += self._latest
        self._loss, self._latest = self._latest, _no_images()
        if self._comm.rank == 0:
            self.reports.append(self._aggregator.report())

    def end_epoch(self) -> dict[str, float]:
        """Collective: mean loss, error in percent, number of images of the epoch, over all ranks."""
        self._comm.all_reduce(self._sums, op="sum")
        loss, wrong, images = self._sums.tolist()
        self._sums = _no_images()
        if not math.isfinite(loss):
            raise FloatingPointError(
                "the training loss is not finite: lower --lr, or make the warmup "
                "longer with --warmup-epochs"
            )
        return {
            "train_loss": loss / images,
            "train_error": 100.0 * wrong / images,
            "train_images": int(images),
        }

    def recent(self) -> dict[str, Any]:
        """Numbers of a log line: rank 0's loss, and speeds over the last `WINDOW` iterations."""
        steps, waits = list(self._step_s)[-WINDOW:], list(self._data_s)[-WINDOW:]
        reports = list(self.reports)[-WINDOW:]
        busy, total = sum(steps), sum(steps) + sum(waits)
        return {
            "loss": (self._loss[0] / self._loss[2]).item(),
            "loss_mean": (self._sums[0] / self._sums[2]).item(),
            "images_per_s": self._minibatch * len(steps) / total,
            "compute_images_per_s": self._minibatch * len(steps) / busy,
            "data_wait_percent": 100.0 * sum(waits) / total,
            "comm_exposed_percent": (
                100.0
                * sum(r["exposed_comm_s"] for r in reports)
                / max(sum(r["window_s"] for r in reports), 1e-9)
            ),
            "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }

    def median_step_s(self) -> float:
        return statistics.median(_steady(self._step_s))

    def communication(self) -> dict[str, Any]:
        """Medians over the steady iterations; overlap is None where nothing was communicated."""
        reports = _steady(self.reports)
        # A single process runs the same path with nobody at the other end: nothing to hide.
        ratios = [r["overlap_ratio"] for r in reports if r["overlap_ratio"] is not None]
        ratios = ratios if self._comm.size > 1 else []
        exposed = sorted(1e3 * r["exposed_comm_s"] for r in reports)
        return {
            "iterations": len(reports),
            "overlap_ratio": statistics.median(ratios) if ratios else None,
            "exposed_ms": statistics.median(exposed) if ratios else None,
            "exposed_ms_p90": exposed[(9 * len(exposed)) // 10] if ratios else None,
            "busy_ms": statistics.median(1e3 * r["comm_busy_s"] for r in reports),
        }

    def typical_report(self) -> dict[str, Any]:
        """The iteration of median length: the one to draw."""
        reports = sorted(_steady(self.reports), key=lambda r: r["window_s"])
        return reports[len(reports) // 2]

    def throughput(self) -> dict[str, float]:
        """Images/s in the median iteration, and end to end: evaluation and checkpoints included."""
        elapsed = time.perf_counter() - self._started
        return {
            "images_per_s": self._minibatch / self.median_step_s(),
            "images_per_s_end_to_end": self._minibatch * self.steps / elapsed,
        }


def _no_images() -> Tensor:
    """Loss, number of wrong answers, number of images: sums."""
    return torch.zeros(3, dtype=torch.float64)


def _steady(values: Iterable[Any]) -> list[Any]:
    """Without the first iterations, or without the first half where there are few."""
    kept = list(values)
    return kept[min(WARMUP_ITERATIONS, len(kept) // 2) :]
