"""The pictures of a comparison: one style per group, a band where it has several runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train import plots
from train.compare import Group
from train.plots import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY
from train.records import Records

# Colour, line and marker differ together: each alone tells groups apart.
STYLES = (
    (BLUE, "-", "o"),
    (RED, "--", "s"),
    (GREEN, "-.", "^"),
    (PINK, ":", "D"),
    (ORANGE, (0, (5, 1)), "v"),
    (SKY, (0, (3, 1, 1, 1)), "P"),
)
Style = dict[str, Any]
Points = list[tuple[float, float]]


def of_groups(groups: Sequence[Group]) -> list[tuple[Figure, str]]:
    """Every picture that the records suffice for, with what it shows."""
    drawn = list(zip(groups, styles(groups), strict=True))
    several = any(len(group.runs) > 1 for group in groups)
    band = (
        " Line: mean over the runs of a group; band: from its lowest to its highest run." * several
    )
    found = [
        (
            errors(drawn),
            f"Held-out and training error by epoch, held-out error by wall time.{band}",
        ),
        (speeds(drawn), f"Learning rate and throughput by epoch.{band}"),
    ]
    if any(group.errors for group in groups):
        text = "Final error: small points are runs, the large one their mean"
        text += ", the bar one standard deviation (n - 1) to either side." if several else "."
        found.append((finals(drawn), text))
    if any(timeline_of(group) for group in groups):
        text = (
            "One iteration of median length of rank 0, of the first run of each group; one scale."
        )
        found.append((timelines(groups), text))
    return found


def styles(groups: Sequence[Group]) -> list[Style]:
    """The baseline's is black; with more groups than styles they come round again."""
    others = iter(range(len(groups)))
    return [
        _style(
            group, (BLACK, "-", "*") if group.is_baseline else STYLES[next(others) % len(STYLES)]
        )
        for group in groups
    ]


def _style(group: Group, look: tuple[str, Any, str]) -> Style:
    colour, line, marker = look
    name = f"baseline: {group.label}" if group.is_baseline else group.label
    count = f"{len(group.runs)} runs" if len(group.runs) > 1 else group.runs[0].name
    return {"color": colour, "linestyle": line, "marker": marker, "label": f"{name} ({count})"}


def errors(drawn: Sequence[tuple[Group, Style]]) -> Figure:
    figure, (held_out, training, by_time) = plots.grid(1, 3, height=4.8)
    longest_s = max(
        (r["wall_s"] for g, _ in drawn for run in g.runs for r in run.epochs), default=0
    )
    unit, unit_s = plots.time_unit(longest_s)
    for group, style in drawn:
        band(held_out, group, lambda run: by_epoch(run, "test_error"), style)
        band(training, group, lambda run: by_epoch(run, "train_error"), style)
        for run in group.runs:  # whose epochs end at times of their own: no mean
            times = [r["wall_s"] / unit_s for r in run.epochs]
            by_time.plot(times, run.errors, **style, markersize=3, linewidth=1)
    held_out.set(xlabel="epoch", ylabel="held-out error (%)", title="Held-out error")
    training.set(
        xlabel="epoch", ylabel="training error (%)", title="Training error, while it learns"
    )
    by_time.set(
        xlabel=f"wall time ({unit})", ylabel="held-out error (%)", title="Each run by wall time"
    )
    for axes in (held_out, training, by_time):
        plots.error_scale(axes)
    for axes in (held_out, training):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, held_out)
    return figure


def speeds(drawn: Sequence[tuple[Group, Style]]) -> Figure:
    figure, (rate, speed) = plots.grid(1, 2, height=4.6)
    for group, style in drawn:
        plots.draw_rate(rate, group.runs[0], **{**style, "marker": ""})
        band(speed, group, lambda run: by_epoch(run, "images_per_s"), style)
    speed.set_ylim(bottom=0)
    speed.set(
        xlabel="epoch", ylabel="images/s, all ranks", title="Throughput, mean of the iterations"
    )
    for axes in (rate, speed):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, speed)
    return figure


def finals(drawn: Sequence[tuple[Group, Style]]) -> Figure:
    """Final error by minibatch if that is what differs, else by group."""
    shown = [(group, style) for group, style in drawn if group.errors]
    sizes = [group.runs[0].derived["minibatch"] for group, _ in shown]
    by_size = len(set(sizes)) == len(sizes) > 1
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    axes = figure.subplots()
    for i, (group, style) in enumerate(shown):
        x = sizes[i] if by_size else i
        look = {k: style[k] for k in ("color", "marker", "label")}
        beside = 0.97 * x if by_size else x - 0.04
        axes.plot([beside] * len(group.errors), group.errors, ".", color=style["color"], alpha=0.6)
        axes.errorbar(x, group.mean or 0.0, yerr=group.deviation, capsize=5, markersize=9, **look)
    if by_size:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.set_xlabel("minibatch (images)")
    else:
        axes.set_xticks(range(len(shown)), [""] * len(shown))
        axes.set_xlim(-0.5, len(shown) - 0.5)
    axes.set(ylabel="held-out error (%), median of the last 5 epochs", title="Final error")
    axes.grid(alpha=0.25)
    _legend(figure, axes)
    return figure


def timelines(groups: Sequence[Group]) -> Figure:
    reports = [(group, found) for group in groups if (found := timeline_of(group))]
    heights = [len(report["buckets"]) + 3 for _, report in reports]
    total = min(1.2 + sum(0.9 + 0.28 * rows for rows in heights), 3 * plots.TALLEST_INCHES)
    figure = Figure(figsize=(12, total), layout="constrained")
    panels = figure.subplots(len(reports), sharex=True, height_ratios=heights, squeeze=False)
    for (group, report), axes in zip(reports, panels.flat, strict=True):
        plots.draw_timeline(axes, report)
        name = f"baseline: {group.label}" if group.is_baseline else group.label
        text = f"{name}\n{plots.timeline_text(report)}"
        axes.set_title(text, loc="left", fontsize="small")
    for axes in panels.flat[:-1]:
        axes.set_xlabel("")
    longest_s = max(report["window_s"] for _, report in reports)
    panels.flat[0].set_xlim(0, 1e3 * longest_s)
    figure.legend(
        handles=plots.TIMELINE_LEGEND,
        loc="outside upper center",
        ncols=len(plots.TIMELINE_LEGEND),
        frameon=False,
        fontsize="small",
        columnspacing=1.2,
    )
    return figure


def timeline_of(group: Group) -> dict[str, Any] | None:
    return next((run.timeline for run in group.runs if run.timeline), None)


def by_epoch(run: Records, key: str) -> Points:
    return [(r["step"] / run.per_epoch, r[key]) for r in run.epochs if key in r]


def band(axes: Axes, group: Group, points: Callable[[Records], Points], style: Style) -> None:
    """The mean over the runs at every x that all of them have, and the range that they fill.

    Runs that ended early count only where no run has all its epochs.
    """
    rows = [dict(points(run)) for run in group.whole or group.runs if run.epochs]
    shared = sorted(set.intersection(*(set(row) for row in rows))) if rows else []
    values = [[row[x] for row in rows] for x in shared]
    axes.plot(shared, [statistics.fmean(v) for v in values], **style, markersize=4)
    if len(rows) > 1:
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(shared, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _legend(figure: Figure, axes: Axes) -> None:
    """Below all panels: labels are as long as what differs, so as many columns as they leave room for."""
    handles, names = axes.get_legend_handles_labels()
    for ncols in range(min(3, len(names)), 0, -1):
        legend = figure.legend(
            handles, names, loc="outside lower center", ncols=ncols, frameon=False
        )
        if legend.get_window_extent().width <= figure.bbox.width or ncols == 1:
            return
        legend.remove()
