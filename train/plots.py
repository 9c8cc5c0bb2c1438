"""The pictures of one run, drawn from its records alone; comparisons use the same parts.

Colours are Okabe and Ito's, which people with any colour vision tell apart; what matters most
(exposed communication) is hatched as well.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from train.records import Records

Interval = tuple[float, float]

BLACK, GREY = "#222222", "#999999"
BLUE, SKY, GREEN = "#0072b2", "#56b4e9", "#009e73"
YELLOW, ORANGE, RED, PINK = "#f0e442", "#e69f00", "#d55e00", "#cc79a7"

FORWARD, BACKWARD, UPDATE, TRANSFER = BLUE, SKY, PINK, ORANGE
QUEUE: dict[str, Any] = {"facecolor": "white", "edgecolor": GREY, "hatch": "////", "linewidth": 0.5}
EXPOSED: dict[str, Any] = {
    "facecolor": RED,
    "edgecolor": "#662c00",
    "hatch": "xxx",
    "linewidth": 0.0,
}
WAITING = 0.12  # opacity of the time in which the training thread waits
TIMELINE_LEGEND = [
    Patch(facecolor=FORWARD, label="forward"),
    Patch(facecolor=BACKWARD, label="backward"),
    Patch(label="bucket waits", **QUEUE),
    Patch(facecolor=TRANSFER, label="bucket is reduced, or awaits a slower rank"),
    Patch(label="exposed: nothing computes", **EXPOSED),
    Patch(facecolor=RED, alpha=WAITING, label="update waits for buckets"),
    Patch(facecolor=UPDATE, label="update"),
]
# Parts of an iteration as train.metrics names them: label, colour, hatch.
PARTS = {
    "compute_ms": ("computing", BLUE, ""),
    "comm_exposed_ms": ("exposed communication", RED, "///"),
    "data_wait_ms": ("waiting for the loader", YELLOW, "..."),
    "other_ms": ("other", GREY, ""),
}
DPI = 110
# More rows than fit on a page are drawn thinner.
TALLEST_INCHES = 14.0


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    figure.set_layout_engine("none")  # it stays as it is: finding the layout is half of the time
    return buffer.getvalue()


def svg(figure: Figure, path: Path) -> None:
    """The same picture for papers, after `png`. Its bytes depend on what is drawn only."""
    with rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def of_run(run: Records) -> dict[str, tuple[Figure, str]]:
    """Every picture that the records suffice for: by name the figure, and what it shows."""
    pictures = {}
    if run.metrics:
        pictures["curves"] = (curves(run), "Error, loss and learning rate by epoch; error by time.")
    if run.steps:
        pictures["speed"] = (
            speed(run),
            "Images per second, and what an iteration of rank 0 consists of, by epoch.",
        )
    if run.measured and run.derived["processes"] > 1:
        pictures["ranks"] = (
            ranks(run),
            "What an iteration consists of on every rank; who waited for the others, and when.",
        )
    if run.timeline:
        pictures["timeline"] = (
            timeline(run.timeline, run.caption),
            "One iteration of median length on rank 0: what computed, and when each bucket waited "
            "and travelled.",
        )
    return pictures


def curves(run: Records) -> Figure:
    """Error and loss by epoch, of training and held out; learning rate; held-out error by time."""
    epochs, per_epoch = run.epochs, run.per_epoch
    x = [r["step"] / per_epoch for r in epochs]
    figure, ((error, by_time), (loss, rate)) = grid(2, 2)

    train_style = {"color": BLUE, "label": "training, while it learns"}
    test_style = {"color": RED, "label": "held out", "linestyle": "--", "marker": ".", "zorder": 3}
    error.plot(x, [r["train_error"] for r in epochs], **train_style)
    error.plot(x, run.errors, **test_style)
    error.set(xlabel="epoch", ylabel="error (%)", title="Error")

    unit, unit_s = time_unit(run.metrics[-1]["wall_s"])
    by_time.plot([r["wall_s"] / unit_s for r in epochs], run.errors, **test_style)
    by_time.set(
        xlabel=f"wall time ({unit})", ylabel="held-out error (%)", title="Error by wall time"
    )

    loss.plot(
        [r["step"] / per_epoch for r in run.steps],
        numbers(run.steps, "loss"),
        color=SKY,
        linewidth=0.8,
        label="training, rank 0, single iterations",
    )
    loss.plot(x, numbers(epochs, "train_loss"), color=BLUE, label="training, mean of the epoch")
    loss.plot(x, numbers(epochs, "test_loss"), **test_style)
    loss.set_yscale("log")
    loss.set(xlabel="epoch", ylabel="cross-entropy (nats)", title="Loss")

    draw_rate(rate, run, color=BLACK)
    rate.set_title(f"Learning rate (minibatch {run.derived['minibatch']:,})")
    for axes in (error, by_time):
        error_scale(axes)
    for axes in (error, loss, rate):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (error, loss):
        axes.legend(fontsize="small")
    caption(figure, run.caption)
    return figure


def speed(run: Records) -> Figure:
    """Images/s by epoch, with and without waiting for the loader; parts of an iteration."""
    steps = run.steps
    x = [r["step"] / run.per_epoch for r in steps]
    figure, (rate, split) = grid(1, 2)

    rate.plot(
        x,
        numbers(steps, "compute_images_per_s"),
        color=SKY,
        linewidth=5,
        alpha=0.6,
        label="without waiting for the loader",
    )
    rate.plot(x, numbers(steps, "images_per_s"), color=BLUE, label="last 20 iterations")
    if run.epochs:
        rate.plot(
            [r["step"] / run.per_epoch for r in run.epochs],
            numbers(run.epochs, "images_per_s"),
            color=BLACK,
            linestyle="none",
            marker="_",
            markersize=10,
            label="mean of the epoch's iterations",
        )
    rate.set_ylim(0, 1.1 * max(numbers(steps, "compute_images_per_s")))
    rate.set(xlabel="epoch", ylabel="images/s, all ranks", title="Throughput")
    rate.legend(fontsize="small", loc="lower right")

    areas = split.stackplot(
        x,
        [numbers(steps, part) for part in PARTS],
        labels=[label for label, _, _ in PARTS.values()],
        colors=[colour for _, colour, _ in PARTS.values()],
    )
    for area, (_, _, hatch) in zip(areas, PARTS.values(), strict=True):
        area.set(hatch=hatch, edgecolor="white", linewidth=0)
    split.set_ylim(bottom=0)
    split.set(
        xlabel="epoch",
        ylabel="milliseconds, mean of 20 iterations",
        title="What an iteration of rank 0 consists of",
    )
    split.legend(fontsize="small", loc="lower right", framealpha=0.9)
    caption(figure, run.caption)
    return figure


def ranks(run: Records) -> Figure:
    """By rank: the parts of an iteration of the last epoch; who waited for whom, by iteration."""
    last = run.measured[-1]
    per_rank = last["per_rank"]
    count = len(per_rank["compute_ms"])
    height = min(1.6 + 0.34 * count, TALLEST_INCHES)
    figure, (split, waiting) = grid(1, 2, height=max(height, 3.2))

    left = [0.0] * count
    for part, (label, colour, hatch) in PARTS.items():
        widths = per_rank[part]
        split.barh(
            range(count),
            widths,
            left=left,
            label=label,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0,
        )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for rank, ratio in enumerate(per_rank["overlap_ratio"] if count <= 32 else ()):
        if ratio is not None:
            text = f" overlap {ratio:.2f}"
            split.text(left[rank], rank, text, va="center", fontsize="small")
    split.set_xlim(0, 1.25 * max(left))
    split.set(
        xlabel="milliseconds, mean of the epoch",
        ylabel="rank",
        title=f"What an iteration consists of, epoch {last['epoch'] + 1}",
    )
    split.legend(
        fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False
    )

    rows = [r for r in run.steps if len(r["skew_ms"]) == count]
    waiting.set(
        xlabel="iteration", ylabel="rank", title="Waiting for the last rank (the straggler is dark)"
    )
    waiting.grid(False)
    if rows:
        mesh = waiting.pcolormesh(
            [r["step"] for r in rows],
            range(count),
            list(zip(*(r["skew_ms"] for r in rows), strict=True)),
            cmap="cividis",
            shading="nearest",
            vmin=0,
        )
        figure.colorbar(mesh, ax=waiting, label="ms per iteration, mean of 20")
    else:
        waiting.text(0.5, 0.5, "not recorded by this kind of group", ha="center")
    for axes in (split, waiting):
        axes.invert_yaxis()
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    caption(figure, run.caption)
    return figure


def timeline(report: dict[str, Any], text: str) -> Figure:
    """One iteration of one rank. `report` is `GradientAggregator.report()`."""
    rows = len(report["buckets"]) + 3
    figure = Figure(figsize=(12, min(1.9 + 0.42 * rows, TALLEST_INCHES)), layout="constrained")
    axes = figure.subplots()
    draw_timeline(axes, report)
    axes.set_xlim(0, 1e3 * report["window_s"])
    axes.legend(
        handles=TIMELINE_LEGEND,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(TIMELINE_LEGEND),
        frameon=False,
        fontsize="small",
        columnspacing=1.2,
    )
    caption(figure, f"{text}\n{timeline_text(report)}")
    return figure


def draw_timeline(axes: Axes, report: dict[str, Any]) -> None:
    """What computed, and when each bucket waited and travelled, in seconds from the first forward.

    Red and crossed is transfer that no computation covered.
    """
    phases, buckets = report.get("phases", []), report["buckets"]
    compute = _union((p["start_s"], p["end_s"]) for p in phases if p["name"] != "wait")
    rows = ["forward", "backward", *[f"bucket {b['index']}" for b in buckets], "update"]
    at = {row: len(rows) - 1 - i for i, row in enumerate(rows)}
    colours = {"forward": FORWARD, "backward": BACKWARD, "update": UPDATE}
    for phase in phases:
        if phase["name"] in colours:
            interval = (phase["start_s"], phase["end_s"])
            _bar(axes, at[phase["name"]], interval, facecolor=colours[phase["name"]])
        else:
            begin_ms, end_ms = 1e3 * phase["start_s"], 1e3 * phase["end_s"]
            axes.axvspan(begin_ms, end_ms, color=RED, alpha=WAITING, linewidth=0)
    for bucket in buckets:
        row = at[f"bucket {bucket['index']}"]
        queue, transfer = (
            (bucket["ready_s"], bucket["start_s"]),
            (bucket["start_s"], bucket["end_s"]),
        )
        _bar(axes, row, queue, **QUEUE)
        _bar(axes, row, transfer, facecolor=TRANSFER)
        for exposed in _outside(transfer, compute):
            _bar(axes, row, exposed, **EXPOSED)
    every = 1 + len(rows) // 40  # labels would cover each other
    shown = {row: y for i, (row, y) in enumerate(at.items()) if i % every == 0}
    axes.set_yticks(list(shown.values()), [_row_label(row, buckets) for row in shown])
    axes.set_xlabel("milliseconds from the first forward")
    axes.grid(axis="x", alpha=0.25)


def timeline_text(report: dict[str, Any]) -> str:
    ratio = report["overlap_ratio"]
    overlap = "overlap ratio undefined" if ratio is None else f"overlap ratio {ratio:.2f}"
    return (
        f"iteration {report['iteration']}: {1e3 * report['window_s']:.2f} ms, {overlap}, "
        f"{1e3 * report['exposed_comm_s']:.2f} ms of {1e3 * report['comm_busy_s']:.2f} ms of "
        "communication exposed"
    )


# Parts that comparisons use too.


def grid(rows: int, columns: int, height: float | None = None) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6 * columns, height or 3.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns)
    for axes in panels.flat:
        axes.grid(alpha=0.25)
    return figure, panels


def draw_rate(axes: Axes, run: Records, **style: Any) -> None:
    """The learning rate of every iteration there was, or of 2,000 of them."""
    every = max(1, run.step // 2000)
    steps = range(0, run.step, every)
    x = [t / run.per_epoch for t in (*steps, run.step)]
    rates = [run.rate(t) for t in (*steps, max(0, run.step - 1))]
    axes.plot(x, rates, drawstyle="steps-post", **style)
    axes.set_yscale("log")
    axes.set(xlabel="epoch", ylabel="learning rate", title="Learning rate")


def time_unit(longest_s: float) -> tuple[str, float]:
    """The unit for times up to this one, and its seconds."""
    return next(
        ((unit, size) for unit, size in (("h", 3600.0), ("min", 60.0)) if longest_s > 3 * size),
        ("s", 1.0),
    )


def error_scale(axes: Axes) -> None:
    """Linear below 1 %, where an error of 0 has its place; logarithmic above."""
    axes.set_yscale("symlog", linthresh=1.0)
    axes.set_ylim(0, 100)
    ticks = ["0", "0.5", "1", "2", "5", "10", "20", "50", "100"]
    axes.set_yticks([float(tick) for tick in ticks], ticks)
    axes.minorticks_off()


def numbers(records: Iterable[dict[str, Any]], key: str) -> list[float]:
    """The values of a key; what was not finite, or not measured, leaves a gap."""
    return [float("nan") if r.get(key) is None else r[key] for r in records]


def caption(figure: Figure, text: str) -> None:
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, 150)]
    figure.supxlabel("\n".join(lines), fontsize="small", color="#444444")


def _bar(axes: Axes, row: int, interval: Interval, **style: Any) -> None:
    begin_s, end_s = interval
    axes.broken_barh(
        [(1e3 * begin_s, 1e3 * max(0.0, end_s - begin_s))], (row - 0.36, 0.72), **style
    )


def _row_label(row: str, buckets: Sequence[dict[str, Any]]) -> str:
    if not row.startswith("bucket "):
        return row
    size = buckets[int(row.split()[1])]["bytes"]
    shown = f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"
    return f"{row} ({shown})"


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
