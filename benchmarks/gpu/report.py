"""``python -m benchmarks.gpu.report FILE``: keeps what `make gpu-check` found; its table and its pictures.

The result becomes a line of benchmarks/results/GPU.jsonl (without what passed tests and stages had to say), the table
GPU.md beside it, the picture docs/roofline.png. A dry run proves nothing and is refused.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.check import ROOT, commit, digest_of_sources, says
from benchmarks.gpu.roofline import Kernel, draw_roofline, kernels_of
from benchmarks.harness import markdown, time_name

Result = dict[str, Any]


def rows_of(result: Result, stage: str) -> list[dict[str, Any]]:
    return next((r.get("rows", []) for r in result["stages"] if r["stage"] == stage), [])


def machine_of(result: Result) -> dict[str, Any]:
    return next(iter(rows_of(result, "machine")), {})


def slug(result: Result) -> str:
    """``h200``: names the files of one kind of GPU."""
    name = machine_of(result)["gpu"]["name"].lower()
    return "-".join(re.findall(r"[a-z0-9]+", name.replace("nvidia", "")))


# --- the line that is kept -------------------------------------------------------------------------------------------


def kept(result: Result) -> Result:
    """Without the words of what passed. A tree without git is named by its commit if it is the one that lies here."""
    stages = [_without_words(record) for record in result["stages"]]
    here = result["commit"] == "unknown" and result["sources"] == digest_of_sources()
    return {**result, "commit": commit() if here else result["commit"], "stages": stages}


def _without_words(record: dict[str, Any]) -> dict[str, Any]:
    rows = [row for row in record.get("rows", []) if row.get("outcome") != "passed"]
    words = {} if record["status"] == "passed" else {"tail": record.get("tail", "")}
    return {k: v for k, v in record.items() if k not in ("rows", "tail")} | {"rows": rows} | words


def keep(result: Result, folder: Path) -> Path:
    """Adds the line, or replaces that of the same run."""
    path = folder / f"{slug(result)}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    others = [line for line in lines if json.loads(line)["started"] != result["started"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in [*others, json.dumps(kept(result))]))
    return path


# --- the table -------------------------------------------------------------------------------------------------------


def _stages(result: Result) -> list[str]:
    rows = []
    for record in result["stages"]:
        words = _one_line(record.get("why") or says(record.get("rows", [])))
        rows.append([record["stage"], record["status"], f"{record.get('seconds', 0):.0f} s", words])
    return markdown(["stage", "outcome", "time", "what it says"], rows)


def _kernels(kernels: list[Kernel]) -> list[str]:
    header = ["kernel", "must move", "time", "GB/s", "of copy bandwidth", "result"]
    rows = [
        [
            kernel.name,
            f"{kernel.moved_bytes / 1e6:.1f} MB",
            time_name(kernel.median_us),
            f"{kernel.gb_s:.0f}",
            f"{kernel.of_copy:.1%}",
            "right" if kernel.verified else "WRONG",
        ]
        for kernel in kernels
    ]
    return markdown(header, rows)


def _bars(result: Result) -> list[str]:
    rows = [
        [
            row["bar"],
            f">= {row['at_least']:g}" if "at_least" in row else f"<= {row['at_most']:g}",
            f"{row['value']:.3f}",
            "yes" if row["met"] else "no",
        ]
        for stage in ("kernels", "training")
        for row in rows_of(result, stage)
        if "bar" in row
    ]
    return markdown(["what", "bar", "ours", "met"], rows) if rows else []


def _training(result: Result) -> list[str]:
    header = [
        "images",
        "way",
        "images/s",
        "step",
        "update",
        "of the step",
        "host, forward + backward",
    ]
    rows = []
    for record in (row for row in rows_of(result, "training") if "ways" in row):
        images = str(record["batch"])
        for way, found in record["ways"].items():
            host_us = (found["host_ms"]["forward"] + found["host_ms"]["backward"]) * 1e3
            times = [time_name(found[name] * 1e3) for name in ("step_ms", "update_ms")]
            share = f"{found['update_share']:.2%}"
            rows.append(
                [images, way, f"{found['images_per_s']:.0f}", *times, share, time_name(host_us)]
            )
        for way, added in record["added_ms"].items():
            extra = [f"{added[name] * 1e3:+.0f} us" for name in ("step", "host")]
            what = f"added by {way} (pairs of blocks)"
            rows.append([images, what, "-", extra[0], "-", "-", extra[1]])
    return markdown(header, rows)


def _ranks(result: Result) -> list[str]:
    rows = []
    for row in rows_of(result, "ranks on one GPU"):
        if "works" not in row:
            if "untried" in row:
                rows.append([row["way"], str(row["ranks"]), f"not tried: {row['untried']}", "-"])
            continue
        times = row.get("all_reduce_ms", {})
        biggest = max(times, key=int, default=None)
        shown = "-" if biggest is None else f"{times[biggest]:.1f} ms ({int(biggest):,} elements)"
        verdict = "WRONG" if row["wrong"] else "right" if row["works"] else _one_line(row["why"])
        rows.append([row["way"], str(row["ranks"]), verdict, shown])
    return markdown(["way", "ranks", "results", "all-reduce"], rows)


def _two_ranks(result: Result) -> list[str]:
    header = ["way", "largest error", "ranks", "step", "overlap", "exposed", "communicating"]
    rows = []
    for row in rows_of(result, "two ranks train on one GPU"):
        if "mode" not in row:
            continue
        bits = "same bits" if row["same_bits"] else "DIFFER"
        cells = [row["mode"], f"{row['error']:.1e}", bits, time_name(row["step_ms"] * 1e3)]
        if row["overlap_ratio"] is None:
            cells += ["-", "-", "-"]
        else:
            times = [time_name(row[name] * 1e6) for name in ("exposed_comm_s", "comm_busy_s")]
            cells += [f"{row['overlap_ratio']:.0%}", *times]
        rows.append(cells)
    return markdown(header, rows)


def _one_line(text: str) -> str:
    """The first, fit for a cell."""
    return (text.strip().splitlines() or [""])[0][:160].replace("|", "/")


def _about(result: Result) -> str:
    seen = machine_of(result)
    driver = (seen.get("card") or {}).get("driver_version", "unknown")
    return (
        f"{seen['gpu']['name']}, driver {driver}, CUDA {seen['cuda']}, torch {seen['torch']}, NCCL {seen['nccl']}, "
        f"Python {seen['python']}; commit {result['commit']}, sources {result['sources']}, {result['started']}. "
        f"`make gpu-check`, {result['seconds']:.0f} s."
    )


def markdown_of(result: Result) -> str:
    parts = [["# One GPU"], [_about(result)], _stages(result)]
    if kernels := kernels_of(rows_of(result, "kernels")):
        parts += [["## Kernels"], _bars(result), _kernels(kernels)]
    if rows_of(result, "training"):
        parts += [["## ResNet-50, world size 1, bf16 autocast, channels_last"], _training(result)]
    if rows_of(result, "ranks on one GPU"):
        parts += [["## Several ranks on one GPU"], _ranks(result)]
    if rows_of(result, "two ranks train on one GPU"):
        parts += [["## Two ranks train on one GPU"], _two_ranks(result)]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    given = parser.parse_args(arguments)
    result = json.loads(given.file.read_text())
    if result["dry_run"]:
        print(f"{given.file} is of a dry run: it proves nothing")
        return 2
    if "gpu" not in machine_of(result):
        print(f"{given.file} is of a machine without a GPU")
        return 2
    lines = keep(result, given.results)
    lines.with_suffix(".md").write_text(markdown_of(result))
    written = [lines, lines.with_suffix(".md")]
    kernels = kernels_of(rows_of(result, "kernels"))
    if any(kernel.case == "copy" for kernel in kernels):  # the roof
        given.docs.mkdir(parents=True, exist_ok=True)
        written.append(given.docs / "roofline.png")
        draw_roofline(kernels, machine_of(result), written[-1])
    for path in written:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
