"""`python -m train compare RUN RUN ... --out FILE.html`: runs side by side on one page.

Runs that differ in nothing but their seed are one group: a curve with a band, and one line of the
table with mean and deviation.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pyallreduce import UsageError
from train import page
from train.config import Config, Parser
from train.records import CONFIG, Records

# What may differ inside a group: where, how and how fast a run was fed, not what was run.
_OUTSIDE = {
    "seed",
    "timeout_s",
    *(
        field.name
        for field in dataclasses.fields(Config)
        if field.metadata["group"] in ("run", "data") and not field.metadata["changes_weights"]
    ),
} - {"data_path"}


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one configuration, sorted by seed."""

    label: str
    runs: tuple[Records, ...]
    is_baseline: bool

    @property
    def whole(self) -> list[Records]:
        """The runs with all their epochs; only these have a final error."""
        return [run for run in self.runs if run.is_whole]

    @cached_property
    def errors(self) -> list[float]:
        """Final held-out errors in percent: of each run the median over its last five epochs."""
        return [run.error for run in self.whole if run.error is not None]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.errors) if self.errors else None

    @property
    def deviation(self) -> float | None:
        """Of one run from the mean, estimated from these (n - 1)."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else None


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m train compare",
        description="Compare runs on one page: curves, learning rate, throughput, timelines, and a "
        "table of final errors. Runs that differ only in their seed are taken together.",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run directory, or a directory of such",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        action="append",
        default=[],
        metavar="RUN",
        help="run to compare with, black in all curves; its group's other seeds count too",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("comparison.html"),
        help="page to write (default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the groups and their errors as one JSON object"
    )
    given = parser.parse_args(argv)
    try:
        found = write(given.runs, given.baseline, given.out)
    except OSError as error:
        raise UsageError(f"--out: {given.out} cannot be written ({error.strerror})") from None
    print(json.dumps(numbers(found)) if given.json else given.out)
    return 0


def write(runs: Sequence[Path], baseline: Sequence[Path], out: Path) -> list[Group]:
    """The page about these runs, or directories of runs. UsageError when one is neither."""
    first = [run.resolve() for path in baseline for run in directories(path)]
    others = [run.resolve() for path in runs for run in directories(path)]
    found = groups([Records.read(run) for run in dict.fromkeys([*first, *others])], first)
    page.write(out, html(found, pictures(found)))
    return found


def directories(path: Path) -> list[Path]:
    """The run itself, or the runs directly inside it. UsageError when there is none."""
    if (path / CONFIG).exists():
        return [path]
    found = sorted(config.parent for config in path.glob(f"*/{CONFIG}"))
    if not found:
        raise UsageError(f"{path} is neither a run directory nor one of such, as runs is")
    return found


def groups(runs: Sequence[Records], baseline: Sequence[Path]) -> list[Group]:
    """Runs of equal configuration together, in the order of their first; the baseline's first."""
    members: dict[str, list[Records]] = {}
    for run in runs:
        members.setdefault(repr(sorted(configuration(run).items())), []).append(run)
    named = labels([configuration(group[0]) for group in members.values()])
    found = [
        Group(
            label,
            tuple(sorted(group, key=lambda run: run.config["seed"])),
            any(run.path in baseline for run in group),
        )
        for label, group in zip(named, members.values(), strict=True)
    ]
    return sorted(found, key=lambda group: not group.is_baseline)


def configuration(run: Records) -> dict[str, Any]:
    """What makes a run another run: its recipe and what the recipe became with its processes."""
    derived = {name: run.derived[name] for name in ("processes", "minibatch")}
    chosen = {k: v for k, v in run.config.items() if k not in {*_OUTSIDE, "derived", *derived}}
    return {**chosen, **derived}


def labels(configurations: Sequence[dict[str, Any]]) -> list[str]:
    """What tells each from the others: the values of the keys that are not equal in all."""
    keys = different(configurations)
    if not keys:
        return [f"{c['model']} on {c['dataset']}" for c in configurations]
    return [", ".join(f"{k.replace('_', ' ')} {c.get(k)}" for k in keys) for c in configurations]


def different(configurations: Sequence[dict[str, Any]]) -> list[str]:
    """The keys whose values are not equal in all."""
    every = dict.fromkeys(key for c in configurations for key in c)
    return [key for key in every if len({repr(c.get(key)) for c in configurations}) > 1]


def pictures(found: Sequence[Group]) -> list[tuple[bytes, str]]:
    """Empty, with a word on stderr, where matplotlib is missing."""
    try:
        from train import compare_plots, plots
    except ImportError as error:
        print(f"no pictures: {error}; pip install 'pyallreduce[train]'", file=sys.stderr)
        return []
    return [(plots.png(figure), text) for figure, text in compare_plots.of_groups(found)]


def html(found: Sequence[Group], images: Iterable[tuple[bytes, str]]) -> str:
    runs = [run for group in found for run in group.runs]
    configurations = [configuration(group.runs[0]) for group in found]
    keys = different(configurations)
    parts = [
        page.paragraph(
            "Final error of a run: median of the held-out error over its last five epochs. Of a "
            "group: mean and standard deviation (n - 1) over its runs that have all their epochs."
        ),
        page.table(*final_errors(found), words=1),
        *remarks(found),
        *(page.picture(image, text) for image, text in images),
        page.heading("Runs"),
        page.table(*each_run(found), words=4),
    ]
    if keys:
        rows = [
            (group.label, *(str(c.get(key)) for key in keys))
            for group, c in zip(found, configurations, strict=True)
        ]
        parts += [
            page.heading("What differs"),
            page.table(("group", *keys), rows, words=1 + len(keys)),
        ]
    parts += [page.heading("Configurations and environments")]
    for run in runs:
        content = {"config": run.config, "environment": run.environment}
        parts.append(page.folded(str(run.path), page.values(content)))
    return page.page(f"Comparison of {len(runs)} runs", parts)


def final_errors(found: Sequence[Group]) -> tuple[list[str], list[list[str | None]]]:
    """Headers and rows of the table that matters; differences are to the baseline, if there is one."""
    headers = [
        "group",
        "runs",
        "minibatch",
        "peak learning rate",
        "final error %",
        "training error %",
    ]
    headers += ["images/s", "end to end", "exposed ms", "overlap ratio"]
    baseline = next((group for group in found if group.is_baseline), None)
    if baseline:
        headers.insert(5, "difference to baseline")
    rows = []
    for group in found:
        first = group.runs[0]
        row: list[str | None] = [
            ("baseline: " if group.is_baseline else "") + group.label,
            str(len(group.runs)),
            f"{first.derived['minibatch']:,}",
            f"{first.derived['schedule']['peak']:g}",
            plus_minus(group.mean, group.deviation),
            mean_of([run.epochs[-1]["train_error"] for run in group.whole], "{:.2f}"),
        ]
        if baseline:
            row.insert(5, None if group is baseline else difference(group, baseline))
        ends = [run.summary for run in group.runs if run.summary and run.summary["throughput"]]
        speeds, comms = [e["throughput"] for e in ends], [e["communication"] for e in ends]
        row += [
            mean_of([s["images_per_s"] for s in speeds], "{:,.0f}"),
            mean_of([s["images_per_s_end_to_end"] for s in speeds], "{:,.0f}"),
            mean_of([c["exposed_ms"] for c in comms], "{:.2f}"),
            mean_of([c["overlap_ratio"] for c in comms], "{:.2f}"),
        ]
        rows.append(row)
    return headers, rows


def numbers(found: Sequence[Group]) -> dict[str, Any]:
    """The table of final errors for programs, with the command and machine of every run."""
    return {
        "schema": 1,
        "groups": [
            {
                "label": group.label,
                "is_baseline": group.is_baseline,
                "minibatch": group.runs[0].derived["minibatch"],
                "peak_lr": group.runs[0].derived["schedule"]["peak"],
                "iterations": group.runs[0].total,
                "error": group.mean,
                "deviation": group.deviation,
                "runs": [
                    {
                        "seed": run.config["seed"],
                        "error": run.error if run.is_whole else None,
                        "train_error": run.epochs[-1]["train_error"] if run.epochs else None,
                        "status": run.status,
                        **{
                            k: run.environment.get(k) for k in ("command", "commit", "cpu", "cores")
                        },
                    }
                    for run in group.runs
                ],
            }
            for group in found
        ],
    }


def remarks(found: Sequence[Group]) -> list[str]:
    """What a reader of the table must know, lest it say more than was measured."""
    said = []
    for group in found:
        if unfinished := len(group.runs) - len(group.whole):
            said.append(f"{group.label}: {unfinished} of {len(group.runs)} runs not counted in the "
                        "final error, for they have not all their epochs.")  # fmt: skip
        seeds = [run.config["seed"] for run in group.runs]
        if len(set(seeds)) < len(seeds):
            said.append(f"{group.label}: seeds {', '.join(map(str, seeds))}: runs of one seed are "
                        "not independent, so the deviation is too small.")  # fmt: skip
    return [page.paragraph(text) for text in said]


def each_run(found: Sequence[Group]) -> tuple[list[str], list[list[str | None]]]:
    headers = [
        "run",
        "group",
        "status",
        "commit",
        "seed",
        "final error %",
        "last epoch %",
        "images/s",
    ]
    headers += ["wall time s"]
    rows = []
    above = os.path.commonpath([run.path.parent for group in found for run in group.runs])
    for group in found:
        for run in group.runs:
            speed = (run.summary or {}).get("throughput") or {}
            rows.append(
                [
                    os.path.relpath(run.path, above),
                    group.label,
                    run.status,
                    run.environment.get("commit"),
                    str(run.config["seed"]),
                    mean_of([run.error] if run.is_whole else [], "{:.2f}"),
                    mean_of(run.errors[-1:], "{:.2f}"),
                    mean_of([speed.get("images_per_s")], "{:,.0f}"),
                    mean_of([r["wall_s"] for r in run.metrics[-1:]], "{:,.1f}"),
                ]
            )
    return headers, rows


def plus_minus(mean: float | None, deviation: float | None) -> str | None:
    if mean is None:
        return None
    return f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def difference(group: Group, baseline: Group) -> str | None:
    """In points, and in deviations of the baseline: what lies below 2 may be chance."""
    if group.mean is None or baseline.mean is None:
        return None
    points = group.mean - baseline.mean
    sigmas = f" ({abs(points) / baseline.deviation:.1f} σ)" if baseline.deviation else ""
    return f"{points:+.2f}{sigmas}"


def mean_of(values: Sequence[float | None], form: str) -> str | None:
    """None where there is nothing to take the mean of."""
    known = [value for value in values if value is not None]
    return form.format(statistics.fmean(known)) if known else None
