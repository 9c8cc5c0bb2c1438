"""The rows of kernels.py under the roof of the same run: arithmetic per byte, and the share of copy bandwidth used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Of the formula, per element, whoever computes it: sgd_rule.h with its scale, and what the other kernels are asked for.
FLOPS = {
    "update": 8,
    "update, nesterov": 10,
    "scale, unpack, update, zero": 8,
    "update, bfloat16 gradients and copy": 8,
    "inspect": 3,
    "scale in place": 1,
    "sum of 4": 4,
    "pack": 1,
    "unpack": 1,
}
# Lanes of float32 per multiprocessor, by compute capability (CUDA programming guide, arithmetic throughput).
LANES = {"8.0": 64, "8.6": 128, "8.9": 128, "9.0": 128, "10.0": 128, "12.0": 128}
COLOURS = (
    ("ours", "tab:red", "o"),
    ("torch fused", "tab:blue", "s"),
    ("torch foreach", "tab:purple", "D"),
    ("", "tab:orange", "^"),  # what only we have
)


@dataclass(frozen=True)
class Kernel:
    """A measured method. ``flops`` is None where it has none to speak of."""

    case: str
    method: str
    moved_bytes: int
    median_us: float
    of_copy: float
    verified: bool
    flops: int | None

    @property
    def gb_s(self) -> float:
        return self.moved_bytes / self.median_us / 1e3

    @property
    def name(self) -> str:
        return self.method if self.case == "elementwise" else f"{self.case}: {self.method}"


def kernels_of(rows: list[dict[str, Any]]) -> list[Kernel]:
    """From the rows of kernels.py; those of a sweep are no results."""
    elements = next((row["elements"] for row in rows if "elements" in row), 0)
    return [
        Kernel(
            row["case"],
            row["method"],
            row["bytes"],
            row["median_us"],
            row["of_copy"],
            row["verified"],
            _flops(row["case"], row["method"], elements),
        )
        for row in rows
        if "case" in row and not row["case"].startswith("sweep")
    ]


def _flops(case: str, method: str, elements: int) -> int | None:
    word = method if method in FLOPS else method.split()[0]
    per_element = FLOPS.get(word if case == "elementwise" else case)
    return None if per_element is None else per_element * elements


def copy_gb_s(kernels: list[Kernel]) -> float:
    """The roof: the best copy of the run."""
    return max(kernel.gb_s for kernel in kernels if kernel.case == "copy")


def peak_gflops(machine: dict[str, Any]) -> float | None:
    """Float32 multiply-adds of all lanes at the highest clock; from facts of the card, not measured."""
    gpu, clock = machine["gpu"], (machine.get("card") or {}).get("clocks.max.sm", "")
    lanes, mhz = LANES.get(gpu["capability"]), clock.removesuffix(" MHz")
    if lanes is None or not mhz.isdigit():
        return None
    return 2 * lanes * gpu["multiprocessors"] * int(mhz) / 1e3


def _style(method: str) -> tuple[str, str, str]:
    return next(style for style in COLOURS if method.startswith(style[0]))


def _roofline(axis: Axes, kernels: list[Kernel], bandwidth: float, peak: float | None) -> None:
    ridge = peak / bandwidth if peak else 4.0
    axis.plot(
        [0.05, ridge], [0.05 * bandwidth, ridge * bandwidth], color="0.35", label="copy bandwidth"
    )
    if peak:
        label = "float32 peak at the highest clock (not measured)"
        axis.plot([ridge, 4 * ridge], [peak, peak], "--", color="0.35", label=label)
    shown = set()
    for kernel in kernels:
        if not kernel.flops:
            continue
        prefix, colour, marker = _style(kernel.method)
        label = prefix or "ours, elementwise"
        axis.plot(
            kernel.flops / kernel.moved_bytes,
            kernel.flops / kernel.median_us / 1e3,
            marker,
            color=colour,
            markerfacecolor="none",
            label=None if label in shown else label,
        )
        shown.add(label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("arithmetic per byte that must move, FLOP/B")
    axis.set_ylabel("useful arithmetic, GFLOP/s")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")


def _shares(axis: Axes, kernels: list[Kernel]) -> None:
    names = [kernel.name for kernel in kernels]
    shares = [100 * kernel.of_copy for kernel in kernels]
    colours = [_style(kernel.method)[1] for kernel in kernels]
    axis.barh(names, shares, color=colours, height=0.7)
    for row, kernel in enumerate(kernels):
        words = f" {100 * kernel.of_copy:.0f}" + ("" if kernel.verified else " WRONG")
        axis.text(shares[row], row, words, va="center", fontsize=8)
    axis.axvline(100, color="0.35", lw=1)
    axis.invert_yaxis()
    axis.margins(x=0.15)  # room for the words
    axis.set_xlabel("bytes that must move / time, % of copy bandwidth")
    axis.tick_params(labelsize=8)


def draw_roofline(kernels: list[Kernel], machine: dict[str, Any], path: Path) -> None:
    """Left: the roofline. Right: the share of the roof's slope that each method reaches."""
    bandwidth = copy_gb_s(kernels)
    others = [kernel for kernel in kernels if kernel.case != "copy"]
    height = max(4.5, 0.24 * len(others))
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, height), width_ratios=(1, 1.1))
    figure.suptitle(
        f"CUDA kernels on {machine['gpu']['name']}; copy {bandwidth:.0f} GB/s in the same run",
        fontsize=11,
    )
    _roofline(left, others, bandwidth, peak_gflops(machine))
    _shares(right, others)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110)
    plt.close(figure)
