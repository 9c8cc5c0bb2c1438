"""`python -m train report RUN`: pictures and `report.html` of a run, from its records alone.

Every run leaves them at its end, also one that an error or a signal ended. After `kill -9` this
command makes them.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train import page
from train.config import Parser
from train.records import Records

REPORT, SUMMARY = "report.html", "summary.csv"
VECTORS = "plots"
# Columns of summary.csv under timm's names, then some of our own; the keys of metrics.jsonl.
_COLUMNS = {
    "epoch": "epoch",
    "train_loss": "train_loss",
    "eval_loss": "test_loss",
    "eval_top1": "eval_top1",
    "eval_top5": "eval_top5",  # empty with five classes or fewer
    "lr": "lr",
    "train_top1": "train_top1",
    "images_per_s": "images_per_s",
    "step": "step",
    "wall_s": "wall_s",
}


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m train report",
        description="Draw the pictures of runs again and write their report.html, from their records.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    for run in parser.parse_args(argv).runs:
        missing = write(run)
        print(f"{run / REPORT}" + (f" without pictures: {missing}" if missing else ""))
    return 0


def write(directory: Path, in_a_hurry: bool = False) -> str:
    """Write pictures, summary.csv and report.html; returns why there are no pictures, or nothing.

    In a hurry there are none: drawing takes seconds. UsageError when it is not a run directory.
    """
    run = Records.read(directory)
    write_summary(run)
    page.write(directory / REPORT, html(run, []))  # in case that there is no time for pictures
    if in_a_hurry:
        return "there was no time"
    try:
        from train import plots  # matplotlib: an extra, and half a second of import
    except ImportError as error:
        return f"{error}; pip install 'pyallreduce[train]'"
    (directory / VECTORS).mkdir(exist_ok=True)
    pictures = []
    for name, (figure, text) in plots.of_run(run).items():
        image = plots.png(figure)
        (directory / f"{name}.png").write_bytes(image)
        plots.svg(figure, directory / VECTORS / f"{name}.svg")
        pictures.append((image, text))
    page.write(directory / REPORT, html(run, pictures))
    return ""


def html(run: Records, pictures: Sequence[tuple[bytes, str]]) -> str:
    """The report: what came out, pictures, epochs, configuration, environment."""
    return page.page(
        f"{run.name}: {run.config['model']} on {run.config['dataset']}",
        [
            page.paragraph(run.status[0].upper() + run.status[1:] + "."),
            page.listing(run.environment["command"]),
            page.heading("Results"),
            page.table(("what", "value", "how"), results(run), words=3),
            *(page.picture(image, text) for image, text in pictures),
            page.heading("Epochs"),
            page.table(*epochs(run), words=0),
            page.heading("Configuration"),
            page.values(run.config),
            page.heading("Environment"),
            page.values(run.environment),
        ],
    )


def results(run: Records) -> list[tuple[str, str, str]]:
    """What came out, in words; each with its definition."""
    found = []
    if run.error is not None:
        last = run.epochs[-1]
        found += [
            (
                "held-out error",
                f"{run.error:.2f} %",
                f"median of the last {min(5, len(run.epochs))} epochs; {last['test_images']} images, "
                f"each once, under {last['bn_statistics']}",
            ),
            ("last epoch", f"{run.errors[-1]:.2f} %", f"epoch {last['epoch'] + 1}"),
            *_top5(last),
            ("training error", f"{last['train_error']:.2f} %", "last epoch, while it learns"),
        ]
    derived = run.derived
    found += [
        (
            "minibatch",
            f"{derived['minibatch']:,} images",
            f"{derived['minibatch'] // run.config['batch_size']} workers of "
            f"{run.config['batch_size']} on {derived['processes']} processes",
        ),
        ("learning rate", f"{derived['schedule']['peak']:g}", "at its peak"),
    ]
    if run.summary and run.summary["throughput"]:
        found += _results_at_the_end(run.summary)
    if run.measured and derived["processes"] > 1:
        exposed = run.measured[-1]["per_rank"]["comm_exposed_ms"]
        worst = exposed.index(max(exposed))
        how = f"rank {worst}, mean of the iterations of epoch {run.measured[-1]['epoch'] + 1}"
        found.append(("exposed communication, worst rank", f"{exposed[worst]:.2f} ms", how))
    return found


def _top5(epoch: dict[str, Any]) -> list[tuple[str, str, str]]:
    if "test_error_top5" not in epoch:
        return []
    how = f"epoch {epoch['epoch'] + 1}: the class is not among the best five"
    return [("held-out top-5 error", f"{epoch['test_error_top5']:.2f} %", how)]


def _results_at_the_end(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    speed, comm = summary["throughput"], summary["communication"]
    found = [
        ("throughput", f"{speed['images_per_s']:,.0f} images/s", "minibatch / median iteration"),
        (
            "end to end",
            f"{speed['images_per_s_end_to_end']:,.0f} images/s",
            "images seen / wall time, with evaluation, checkpoints and start of the loader",
        ),
        ("wall time", f"{summary['seconds']:,.1f} s", "with what lies before a resume"),
    ]
    if comm["overlap_ratio"] is not None:
        found += [
            (
                "overlap ratio",
                f"{comm['overlap_ratio']:.2f}",
                f"share of communication during which rank 0 computed; median of "
                f"{comm['iterations']} iterations",
            ),
            (
                "exposed communication",
                f"{comm['exposed_ms']:.2f} ms",
                f"per iteration, median (p10 {comm['exposed_ms_p10']:.2f}, "
                f"p90 {comm['exposed_ms_p90']:.2f}) of {comm['busy_ms']:.2f} ms of communication",
            ),
        ]
    return found


def epochs(run: Records) -> tuple[list[str], list[list[str | None]]]:
    """Headers and rows of the table of epochs."""
    headers = ["epoch", "iterations", "train loss", "train error %", "held-out loss"]
    headers += ["held-out error %", "learning rate", "images/s", "wall time s"]
    rows = [
        [
            str(r["epoch"] + 1),
            f"{r['step']:,}",
            f"{r['train_loss']:.4f}",
            f"{r['train_error']:.2f}",
            f"{r['test_loss']:.4f}",
            f"{r['test_error']:.2f}",
            f"{r['lr']:.4g}",
            f"{r['images_per_s']:,.0f}" if "images_per_s" in r else None,
            f"{r['wall_s']:,.1f}",
        ]
        for r in run.epochs
    ]
    return headers, rows


def write_summary(run: Records) -> None:
    """`summary.csv`: a row per epoch, counted from 0 as timm does."""
    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    rows.writerow(_COLUMNS)
    for r in run.epochs:
        accuracy = {"eval_top1": 100 - r["test_error"], "train_top1": 100 - r["train_error"]}
        if "test_error_top5" in r:
            accuracy["eval_top5"] = 100 - r["test_error_top5"]
        rows.writerow({**r, **accuracy}.get(key) for key in _COLUMNS.values())
    temporary = run.path / f".{SUMMARY}.tmp"
    temporary.write_text(buffer.getvalue(), encoding="utf-8")
    os.replace(temporary, run.path / SUMMARY)
