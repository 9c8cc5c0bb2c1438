"""The pictures of a run: bus bandwidth over size, latency of small buffers, where a training step's time goes."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import Book, Record, busbw_factor, size_name

# Ours in one hue, peers in others, floors grey; line styles tell them apart without colour.
STYLES = {
    "floor": ("floor, shared memory", "0.35", "--"),
    "symmetric": ("pyallreduce, symmetric", "tab:red", "-"),
    "floor, staged": ("floor, private memory", "0.65", ":"),
    "plain": ("pyallreduce, plain tensor", "tab:orange", "-"),
    "openmpi": ("Open MPI", "tab:green", "-."),
    "mpich": ("MPICH", "tab:blue", "-."),
    "gloo": ("gloo", "tab:purple", "-."),
}
SMALL = 64 << 10


def _panels(records: list[Record], title: str) -> tuple[Figure, list[tuple[Axes, list[Record]]]]:
    """One panel per number of ranks."""
    counts = sorted({record["ranks"] for record in records})
    figure, axes = plt.subplots(1, len(counts), figsize=(6 * len(counts), 4.5), squeeze=False)
    machine = records[-1]["machine"]
    figure.suptitle(f"{title}; {machine['cpu']}, {machine['cores']} cores", fontsize=11)
    panels = []
    for axis, ranks in zip(axes[0], counts, strict=True):
        crowded = " (more ranks than cores)" if ranks > machine["cores"] else ""
        axis.set_title(f"{ranks} ranks{crowded}", fontsize=10)
        panels.append((axis, [record for record in records if record["ranks"] == ranks]))
    return figure, panels


def _lines(axis: Axes, records: list[Record], in_busbw: bool) -> None:
    """Medians, and a ribbon from p10 to p90."""
    for method, (label, colour, style) in STYLES.items():
        shown = [record for record in records if method in record["methods"]]
        if not shown:
            continue
        sizes = [record["bytes"] for record in shown]

        def values(quantile: str, shown: list[Record] = shown, method: str = method) -> list[float]:
            times = [record["methods"][method][quantile] for record in shown]
            if not in_busbw:
                return times
            return [
                record["bytes"] / us / 1e3 * busbw_factor(record["ranks"])
                for record, us in zip(shown, times, strict=True)
            ]

        axis.plot(sizes, values("median_us"), style, color=colour, label=label, marker=".")
        axis.fill_between(sizes, values("p10_us"), values("p90_us"), color=colour, alpha=0.12, lw=0)
    axis.set_xscale("log", base=2)
    sizes = [record["bytes"] for record in records]
    axis.set_xticks(sizes, [size_name(size) for size in sizes], rotation=60, fontsize=8)
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def draw_busbw(all_records: list[Record], path: Path) -> None:
    figure, panels = _panels(all_records, "All-reduce, float32, in place")
    for axis, records in panels:
        _lines(axis, records, in_busbw=True)
        axis.set_ylabel("busbw = bytes / time x 2(n-1)/n, GB/s")
        axis.set_ylim(bottom=0)
    _save(figure, path, panels[0][0])


def draw_latency(all_records: list[Record], path: Path) -> None:
    figure, panels = _panels(all_records, "All-reduce up to 64 KiB, whole call")
    for axis, records in panels:
        _lines(axis, records, in_busbw=False)
        axis.set_yscale("log")
        axis.set_ylabel("time of the slowest rank, us")
    _save(figure, path, panels[0][0])


def draw_steps(records: list[Record], path: Path) -> None:
    """Stacked: the phases as the clock around them saw them; of backward, what it takes longer than the plain one."""
    figure, axes = plt.subplots(1, len(records), figsize=(7 * len(records), 4), squeeze=False)
    machine = records[-1]["machine"]
    figure.suptitle(
        f"A training step at 64 px, {records[0]['ranks']} ranks, {records[0]['batch']} images each; "
        f"{machine['cpu']}, {machine['cores']} cores",
        fontsize=11,
    )
    for axis, record in zip(axes[0], records, strict=True):
        _stack(axis, record)
    _save(figure, path, axes[0][0])


def _stack(axis: Axes, record: Record) -> None:
    phases = record["extra"]["phases_us"]
    names = list(phases)
    plain_us = phases["plain"]["backward"]
    parts = {
        "forward": ("tab:blue", [phases[n]["forward"] for n in names]),
        "backward of the plain module": (
            "tab:cyan",
            [min(plain_us, phases[n]["backward"]) for n in names],
        ),
        "added to backward: communication, eager update": (
            "tab:red",
            [max(0.0, phases[n]["backward"] - plain_us) for n in names],
        ),
        "optimizer.step()": ("tab:orange", [phases[n].get("update", 0.0) for n in names]),
        "zero_grad()": ("0.6", [phases[n].get("zero", 0.0) for n in names]),
    }
    left = [0.0] * len(names)
    for label, (colour, values_us) in parts.items():
        values = [us / 1e3 for us in values_us]
        axis.barh(names, values, left=left, color=colour, label=label, height=0.65)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for row, end in enumerate(left):
        axis.text(end, row, f" {end:.0f}", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_title(record["model"], fontsize=10)
    axis.set_xlabel("ms per step (medians, mean over ranks)")
    axis.tick_params(labelsize=8)


def _save(figure: Figure, path: Path, with_legend: Axes) -> None:
    """One legend for all panels, below them, where it hides nothing."""
    figure.set_layout_engine("constrained")
    handles, labels = with_legend.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_all(book: Book, folder: Path) -> list[Path]:
    """Every picture for which there are records; where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    hot = book.select("all_reduce", cache="hot")
    drawn = []
    for name, records, draw in (
        ("busbw", hot, draw_busbw),
        ("latency", [record for record in hot if record["bytes"] <= SMALL], draw_latency),
        ("step", book.select("step"), draw_steps),
    ):
        if records:
            path = folder / f"{name}.png"
            draw(records, path)
            drawn.append(path)
    return drawn
