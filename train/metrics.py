"""What a run measures about itself, and `metrics.jsonl`, where it is kept.

Throughput, overlap and exposed time are defined once for the project; here they are only collected.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyallreduce as par

METRICS = "metrics.jsonl"
SCHEMA = 1
# Allocations, thread start-up and the first touch of shared pages fall into the first iterations.
WARMUP_ITERATIONS = 20
# The speed on a log line is that of so many iterations: fewer jitter, more hide a change.
WINDOW = 20
# About 3 KB each; a run longer than this keeps its newest.
KEPT_ITERATIONS = 512
# The parts of an iteration; they add up to it.
SPLIT = ("compute_ms", "comm_exposed_ms", "data_wait_ms", "other_ms")


class MetricsFile:
    """Appends one JSON object per line and flushes it, so a killed run loses nothing it logged."""

    def __init__(self, path: Path | None, from_step: int, evaluated: int = 0) -> None:
        """Without a path (ranks other than 0) nothing is written.

        `from_step` 0 starts the file anew; otherwise records behind that iteration, which will be
        run again, are taken out, and those of evaluations behind the iteration `evaluated`.
        """
        self._earlier_s = 0.0
        self._file = None
        self._started = time.monotonic()
        if path is None:
            return
        kept = [
            r
            for r in read_metrics(path)
            if r["step"] <= (from_step if r["kind"] == "step" else evaluated)
        ]
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
            self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file:
            self._file.close()


def _finite(value: Any) -> Any:
    """None for inf and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


@dataclasses.dataclass(frozen=True)
class Iteration:
    """From asking for the first images to the end of the update: waiting for the loader, and not."""

    wait_s: float
    busy_s: float
    report: dict[str, Any]  # of the aggregator

    @property
    def total_s(self) -> float:
        return self.wait_s + self.busy_s


class Meter:
    """Adds up one rank's iterations; nothing here communicates except `end_epoch`."""

    def __init__(
        self,
        comm: par.Communicator,
        aggregator: par.GradientAggregator,
        minibatch: int,
        sums: Tensor,
    ) -> None:
        """`sums` [3] are the epoch's of this rank so far: loss, wrong answers, images. They are part
        of a checkpoint, and lie where the network does: adding must not wait for a GPU."""
        self._comm = comm
        self._aggregator = aggregator
        self._minibatch = minibatch
        self._kept: deque[Iteration] = deque(maxlen=KEPT_ITERATIONS)
        self.steps = 0
        self._epoch_steps = 0
        self._epoch_s = 0.0
        self._started = time.perf_counter()
        self._began_s: float | None = None  # the iteration, by asking for its first images
        self._waited_s = 0.0
        self._sums = sums
        self._latest = torch.zeros_like(sums)  # of the iteration

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
                loss.new_tensor(len(labels), dtype=torch.float64),
            ]
        )

    @property
    def loss(self) -> Tensor:
        """Of the iteration's images so far, on this rank: a sum."""
        return self._latest[0]

    def end_iteration(self) -> None:
        """After the update."""
        assert self._began_s is not None
        total_s = time.perf_counter() - self._began_s
        report = self._aggregator.report()
        self._kept.append(Iteration(self._waited_s, total_s - self._waited_s, report))
        self._began_s, self._waited_s = None, 0.0
        self.steps += 1
        self._epoch_steps += 1
        self._epoch_s += total_s
        self._sums += self._latest
        self._loss, self._latest = self._latest, torch.zeros_like(self._sums)

    def begin_epoch(self) -> None:
        self._sums.zero_()

    def end_epoch(self) -> dict[str, Any]:
        """Collective: mean loss, error in percent, number of images of the epoch, over all ranks.

        With the speed of its iterations, and on which parts every rank spent them, if this process
        has seen any: a resumed one may have only the evaluation left.
        """
        sums = self._sums.to("cpu", copy=True)
        self._comm.all_reduce(sums, op="sum")
        loss, wrong, images = sums.tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(
                "the training loss is not finite: lower --lr, or make the warmup "
                "longer with --warmup-epochs"
            )
        speed: dict[str, Any] = {}
        if self._epoch_steps:
            speed = {
                "train_s": self._epoch_s,
                "images_per_s": self._minibatch * self._epoch_steps / self._epoch_s,
                "per_rank": self._all_ranks(self._newest(self._epoch_steps)),
            }
        self._epoch_steps, self._epoch_s = 0, 0.0
        return {
            "train_loss": loss / images,
            "train_error": 100.0 * wrong / images,
            "train_images": int(images),
            **speed,
        }

    def recent(self) -> dict[str, Any]:
        """Numbers of a log line: rank 0's loss, and means over the last `WINDOW` iterations.

        Percentages are of whole iterations, waiting for the loader included. `skew_ms` [r] is how
        long rank r waited for the last one. `grad_norm` is the last iteration's, `nonfinite` the
        first of the window; both are None unless the library looked.
        """
        window = self._newest(WINDOW)
        total, busy = sum(i.total_s for i in window), sum(i.busy_s for i in window)
        return {
            "loss": (self._loss[0] / self._loss[2]).item(),
            "loss_mean": (self._sums[0] / self._sums[2]).item(),
            "images_per_s": self._minibatch * len(window) / total,
            "images_per_s_mean": self._minibatch * self._epoch_steps / self._epoch_s,
            "compute_images_per_s": self._minibatch * len(window) / busy,
            "data_wait_percent": 100.0 * sum(i.wait_s for i in window) / total,
            "comm_exposed_percent": 100.0 * _sum(window, "exposed_comm_s") / total,
            **parts(window),
            "comm_busy_ms": 1e3 * _sum(window, "comm_busy_s") / len(window),
            "overlap_ratio": overlap_ratio(window),
            "skew_ms": _skew_ms(window),
            "grad_norm": window[-1].report["grad_norm"],
            "nonfinite": next((f for i in window if (f := i.report["nonfinite"])), None),
            "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }

    def median_iteration_s(self) -> float:
        return statistics.median(i.total_s for i in self._steady())

    def communication(self) -> dict[str, Any]:
        """Medians over the steady iterations; overlap is None where nothing was communicated."""
        steady = [i.report for i in self._steady()]
        ratios = [r["overlap_ratio"] for r in steady if r["overlap_ratio"] is not None]
        exposed = sorted(1e3 * r["exposed_comm_s"] for r in steady)
        return {
            "iterations": len(steady),
            "overlap_ratio": statistics.median(ratios) if ratios else None,
            "exposed_ms": statistics.median(exposed) if ratios else None,
            "exposed_ms_p10": exposed[len(exposed) // 10] if ratios else None,
            "exposed_ms_p90": exposed[(9 * len(exposed)) // 10] if ratios else None,
            "busy_ms": statistics.median(1e3 * r["comm_busy_s"] for r in steady),
        }

    def typical_report(self) -> dict[str, Any]:
        """The iteration of median length: the one to draw."""
        reports = sorted((i.report for i in self._steady()), key=lambda r: r["window_s"])
        return reports[len(reports) // 2]

    def throughput(self) -> dict[str, float]:
        """Images/s in the median iteration, and end to end: evaluation and checkpoints included."""
        elapsed = time.perf_counter() - self._started
        return {
            "images_per_s": self._minibatch / self.median_iteration_s(),
            "images_per_s_end_to_end": self._minibatch * self.steps / elapsed,
        }

    def _newest(self, count: int) -> list[Iteration]:
        return list(self._kept)[-count:]

    def _steady(self) -> list[Iteration]:
        """Without the first iterations, or without the first half where there are few."""
        kept = list(self._kept)
        return kept[min(WARMUP_ITERATIONS, len(kept) // 2) :]

    def _all_ranks(self, iterations: Sequence[Iteration]) -> dict[str, list[float | None]]:
        """Collective: by rank, `parts` and the overlap ratio."""
        ratio = overlap_ratio(iterations)
        values = {**parts(iterations), "overlap_ratio": math.nan if ratio is None else ratio}
        mine = torch.tensor(list(values.values()), dtype=torch.float64)
        everyone = torch.empty(self._comm.size * len(mine), dtype=torch.float64)
        self._comm.all_gather(everyone, mine)
        columns = everyone.view(self._comm.size, len(mine)).T.tolist()
        return {
            name: [None if math.isnan(value) else round(value, 4) for value in column]
            for name, column in zip(values, columns, strict=True)
        }


def parts(iterations: Sequence[Iteration]) -> dict[str, float]:
    """Where the mean iteration goes, in milliseconds that add up to it.

    Computing, communication that no computation hid, waiting for the loader, and the rest.
    """
    compute, exposed = _sum(iterations, "compute_s"), _sum(iterations, "exposed_comm_s")
    wait = sum(i.wait_s for i in iterations)
    rest = sum(i.total_s for i in iterations) - compute - exposed - wait
    means = (1e3 * seconds / len(iterations) for seconds in (compute, exposed, wait, rest))
    return dict(zip(SPLIT, means, strict=True))


def overlap_ratio(iterations: Sequence[Iteration]) -> float | None:
    """The share of communication that computation hid; None where nothing was communicated."""
    if all(i.report["overlap_ratio"] is None for i in iterations):
        return None
    return 1.0 - _sum(iterations, "exposed_comm_s") / _sum(iterations, "comm_busy_s")


def _sum(iterations: Iterable[Iteration], key: str) -> float:
    return sum(i.report[key] for i in iterations)


def _skew_ms(iterations: Iterable[Iteration]) -> list[float]:
    """Means by rank; empty where the group does not tell when its ranks came."""
    rows = [i.report["skew_s"] for i in iterations if i.report["skew_s"]]
    return [round(1e3 * statistics.fmean(column), 4) for column in zip(*rows, strict=True)]
