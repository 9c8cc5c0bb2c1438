"""The two pictures of a run, drawn from its own records: `curves.png` and `timeline.png`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is ever needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

Interval = tuple[float, float]

FORWARD, BACKWARD, UPDATE = "#4c78a8", "#72a06a", "#8c6bb1"
TRANSFER, WAIT, EXPOSED = "#f2a541", "#9a9a9a", "#d62728"


def curves(
    records: Sequence[dict[str, Any]], rates: Sequence[float], path: Path, caption: str
) -> None:
    """Error by epoch; loss and learning rate by epoch; held-out error by wall time.

    `records` are those of metrics.jsonl, `rates` the learning rate of every iteration. An epoch
    that was logged twice (a run stopped inside it and resumed) counts with its last record.
    """
    epochs = list({r["epoch"]: r for r in records if r["kind"] == "epoch"}.values())
    steps = [r for r in records if r["kind"] == "step"]
    per_epoch = epochs[-1]["iterations_per_epoch"]
    x = [r["step"] / per_epoch for r in epochs]

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")
    left.plot(
        x, [r["train_error"] for r in epochs], label="training, while it learns", color=FORWARD
    )
    left.plot(x, [r["test_error"] for r in epochs], label="held out", color=EXPOSED, marker=".")
    left.set(xlabel="epoch", ylabel="error (%)", title="Error")
    left.legend()

    middle.plot(
        [r["step"] / per_epoch for r in steps],
        [r["loss"] for r in steps],
        color="#b9cbe0",
        label="training loss, worker 0",
    )
    middle.plot(x, [r["train_loss"] for r in epochs], color=FORWARD, label="mean of the epoch")
    middle.plot(x, [r["test_loss"] for r in epochs], color=EXPOSED, label="held out")
    middle.set_yscale("log")
    middle.set(xlabel="epoch", ylabel="cross-entropy", title="Loss and learning rate")
    rate = middle.twinx()
    rate.plot(
        [t / per_epoch for t in range(len(rates))],
        rates,
        color="black",
        linestyle=":",
        label="learning rate (right)",
    )
    rate.set_ylim(bottom=0)
    lines = middle.get_lines() + rate.get_lines()
    middle.legend(lines, [str(line.get_label()) for line in lines], fontsize="small")

    right.plot(
        [r["wall_s"] for r in epochs], [r["test_error"] for r in epochs], color=EXPOSED, marker="."
    )
    right.set(xlabel="wall time (s)", ylabel="held-out error (%)", title="Error by time")
    for axes in (left, right):
        # Linear below 1 %, where an error of 0 has its place; logarithmic above.
        axes.set_yscale("symlog", linthresh=1.0)
        axes.set_ylim(0, 100)
        axes.set_yticks(
            [0, 0.5, 1, 2, 5, 10, 20, 50, 100], ["0", "0.5", "1", "2", "5", "10", "20", "50", "100"]
        )
        axes.minorticks_off()
    for axes in (left, middle):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
    _caption(figure, caption)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def timeline(report: dict[str, Any], path: Path, caption: str) -> None:
    """One iteration of one rank: what computed, and when each bucket waited and travelled.

    `report` is `GradientAggregator.report()`, seconds from the first forward. Red is transfer that
    no computation covered.
    """
    phases = report.get("phases", [])
    buckets = report["buckets"]
    compute = _union((p["start_s"], p["end_s"]) for p in phases if p["name"] != "wait")
    rows = ["forward", "backward", *[f"bucket {b['index']}" for b in buckets], "update"]
    at = {row: len(rows) - 1 - i for i, row in enumerate(rows)}

    figure, axes = plt.subplots(figsize=(12, 1.9 + 0.42 * len(rows)), layout="constrained")
    colours = {"forward": FORWARD, "backward": BACKWARD, "update": UPDATE}
    for phase in phases:
        if phase["name"] in colours:
            _bar(
                axes,
                at[phase["name"]],
                phase["start_s"],
                phase["end_s"],
                facecolor=colours[phase["name"]],
            )
        else:
            axes.axvspan(
                1e3 * phase["start_s"], 1e3 * phase["end_s"], color=EXPOSED, alpha=0.08, linewidth=0
            )
    for bucket in buckets:
        row = at[f"bucket {bucket['index']}"]
        _bar(
            axes,
            row,
            bucket["ready_s"],
            bucket["start_s"],
            facecolor="white",
            edgecolor=WAIT,
            hatch="////",
            linewidth=0.5,
        )
        _bar(axes, row, bucket["start_s"], bucket["end_s"], facecolor=TRANSFER)
        for begin, end in _outside((bucket["start_s"], bucket["end_s"]), compute):
            _bar(axes, row, begin, end, facecolor=EXPOSED)

    axes.set_yticks(list(at.values()), [_label(row, buckets) for row in at])
    axes.set_xlim(0, 1e3 * report["window_s"])
    axes.set_xlabel("milliseconds from the first forward")
    axes.grid(axis="x", alpha=0.25)
    axes.legend(
        handles=[
            Patch(facecolor=FORWARD, label="forward"),
            Patch(facecolor=BACKWARD, label="backward"),
            Patch(facecolor="white", edgecolor=WAIT, hatch="////", label="bucket waits"),
            Patch(facecolor=TRANSFER, label="bucket is reduced (slower ranks awaited)"),
            Patch(facecolor=EXPOSED, label="exposed: nothing computes"),
            Patch(facecolor=UPDATE, label="update"),
        ],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=6,
        frameon=False,
        fontsize="small",
    )
    ratio = report["overlap_ratio"]
    overlap = "overlap ratio undefined" if ratio is None else f"overlap ratio {ratio:.2f}"
    _caption(
        figure,
        f"{caption}\niteration {report['iteration']}: {1e3 * report['window_s']:.2f} ms, "
        f"{overlap}, {1e3 * report['exposed_comm_s']:.2f} ms of "
        f"{1e3 * report['comm_busy_s']:.2f} ms of communication exposed",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bar(axes: Axes, row: int, begin_s: float, end_s: float, **style: Any) -> None:
    axes.broken_barh(
        [(1e3 * begin_s, 1e3 * max(0.0, end_s - begin_s))], (row - 0.36, 0.72), **style
    )


def _label(row: str, buckets: Sequence[dict[str, Any]]) -> str:
    if not row.startswith("bucket "):
        return row
    size = buckets[int(row.split()[1])]["bytes"]
    return f"{row} ({size / 1024:.0f} KiB)"


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _outside(interval: Interval, covered: Sequence[Interval]) -> list[Interval]:
    """The parts of `interval` that no interval of the sorted, disjoint `covered` contains."""
    begin, end = interval
    gaps = []
    for low, high in covered:
        if low > begin:
            gaps.append((begin, min(low, end)))
        begin = max(begin, high)
        if begin >= end:
            break
    if begin < end:
        gaps.append((begin, end))
    return [(low, high) for low, high in gaps if low < high]


def _caption(figure: Any, text: str) -> None:
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, 150)]
    figure.supxlabel("\n".join(lines), fontsize="small", color="#444444")
