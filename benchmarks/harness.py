"""Samples, records, and the book that keeps them: what every benchmark here measures with.

A *source* is a set of ranks (ours with gloo, MPICH, Open MPI) or a floor program; it runs a *block* of calls of one
method while all other sources are blocked in a read. Sources take turns, block by block, so that a busy minute of the
machine falls on all of them; two blocks warm up. A *record* holds the samples of all methods of one case.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

import pyallreduce as par

HERE = Path(__file__).parent
ROOT = HERE.parent
VERSION = 1  # of the JSON lines


# --- samples -----------------------------------------------------------------------------------------------------


@dataclass
class Samples:
    """Seconds of one method's calls, block by block."""

    blocks: list[list[float]] = field(default_factory=list)
    rank0: list[float] = field(
        default_factory=list
    )  # the same calls as rank 0 saw them; may be empty
    wrong: int = 0  # elements that did not hold what they should

    @property
    def all(self) -> list[float]:
        return [second for block in self.blocks for second in block]

    def quantile(self, q: float) -> float:
        """The smallest sample that at least a share ``q`` of all samples does not exceed."""
        ordered = sorted(self.all)
        return ordered[max(0, math.ceil(q * len(ordered)) - 1)]

    @property
    def median(self) -> float:
        return statistics.median(self.all)

    def as_json(self) -> dict[str, Any]:
        def us(seconds: float) -> float:
            return round(seconds * 1e6, 4)

        return {
            "calls": len(self.all),
            "median_us": us(self.median),
            "p10_us": us(self.quantile(0.1)),
            "p90_us": us(self.quantile(0.9)),
            "p99_us": us(self.quantile(0.99)),
            "min_us": us(min(self.all)),
            "max_us": us(max(self.all)),
            "block_medians_us": [us(statistics.median(block)) for block in self.blocks],
            "rank0_median_us": us(statistics.median(self.rank0)) if self.rank0 else None,
            "wrong": self.wrong,
        }


@dataclass
class Block:
    """What a source answers: seconds of each call on the slowest rank and on rank 0, and the wrong elements."""

    seconds: list[float]
    rank0: list[float]
    wrong: int
    wall_s: float  # of the whole block, with rewriting and checking


class Source(Protocol):
    """Runs blocks of calls. ``first`` numbers the calls, so that every call has data of its own."""

    @property
    def methods(self) -> tuple[str, ...]: ...

    def block(self, method: str, calls: int, first: int) -> Block: ...


MAX_CALLS = 500  # of a block: more make no median steadier


def interleave(
    sources: Sequence[Source], blocks: int, block_s: float, min_calls: int
) -> dict[str, Samples]:
    """Goes round all methods of all sources, ``blocks`` times after two blocks of warm-up, of which the second tells
    how many calls fill ``block_s``, at least ``min_calls``. There and back: no method always follows the same other."""
    turns = [(source, method) for source in sources for method in source.methods]
    samples = {method: Samples() for _, method in turns}
    calls = dict.fromkeys(samples, min_calls)
    first = dict.fromkeys(samples, 0)
    for index in range(-2, blocks):
        for source, method in turns if index % 2 else reversed(turns):
            block = source.block(method, calls[method], first[method])
            first[method] += calls[method]
            samples[method].wrong += block.wrong
            if index == -1:
                fitting = int(block_s / block.wall_s * calls[method])
                calls[method] = min(max(fitting, min_calls), MAX_CALLS)
            if index >= 0:
                samples[method].blocks.append(block.seconds)
                samples[method].rank0 += block.rank0
    return samples


# --- the machine -----------------------------------------------------------------------------------------------------


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code: goes into every record. Names no host."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "kernel": platform.release().split("-")[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "isa": par._core.kernels.active_isa(),
        "commit": commit.stdout.strip() or "unknown",
    }


def slug(about: dict[str, Any]) -> str:
    """``amd-epyc-2cores``: names the files of one kind of machine."""
    cpu = re.sub(r"\(.*?\)|@.*|\b(cpu|processor|\d+-core)\b", " ", about["cpu"], flags=re.I)
    return "-".join([*re.findall(r"[a-z0-9]+", cpu.lower()), f"{about['cores']}cores"])


def last_level_cache_bytes() -> int:
    """Of the first core; 32 MiB where the kernel does not say."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(path.read_text().strip().removesuffix("K")) << 10 for path in caches]
    return max(sizes, default=32 << 20)


def evict_bytes() -> int:
    """What a rank walks through to have nothing of its data in a cache."""
    return 4 * last_level_cache_bytes()


# --- records ---------------------------------------------------------------------------------------------------------

Record = dict[str, Any]
NOT_KEY = {"version", "blocks", "methods", "machine", "flags", "notes", "timed", "missing", "extra"}


def key_of(record: Record) -> tuple[tuple[str, Any], ...]:
    """What makes it a record of the same case: all of it but the outcome and the circumstances."""
    return tuple(sorted((k, v) for k, v in record.items() if k not in NOT_KEY))


def busbw_factor(ranks: int) -> float:
    """Of an all-reduce: bytes on the busiest link per byte of the buffer (nccl-tests)."""
    return 2 * (ranks - 1) / ranks


class Book:
    """The records of one kind of machine, one JSON line each. A new record replaces that of the same case."""

    def __init__(self, folder: Path, flags: Sequence[str], blocks: int) -> None:
        self.machine = machine()
        self.flags = [flag for flag in flags if not flag.startswith("--results")]  # a path
        self.blocks = blocks
        self.path = folder / f"{slug(self.machine)}.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        known = [record for record in map(json.loads, lines) if record["version"] == VERSION]
        self._records = {key_of(record): record for record in known}
        self.fresh: list[Record] = []

    def add(
        self,
        benchmark: str,
        samples: dict[str, Samples],
        missing: dict[str, str] | None = None,
        extra: dict[str, Any] | None = None,
        **case: Any,
    ) -> Record:
        """Keeps, and writes at once, the record of one case. ``missing``: methods that could not run, and why."""
        methods = {name: s.as_json() for name, s in samples.items() if s.blocks}
        if "bytes" in case and "ranks" in case:
            for figures in methods.values():
                algbw = case["bytes"] / figures["median_us"] / 1e3
                figures["algbw_gb_s"] = round(algbw, 3)
                figures["busbw_gb_s"] = round(algbw * busbw_factor(case["ranks"]), 3)
        record = {
            "version": VERSION,
            "benchmark": benchmark,
            **case,
            "blocks": self.blocks,
            "timed": "slowest rank of each call",
            "methods": methods,
            "missing": missing or {},
            "extra": extra or {},
            "flags": self.flags,
            "machine": self.machine,
        }
        self._records[key_of(record)] = record
        self.fresh.append(record)
        self._write()
        return record

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(r) + "\n" for r in self.records))

    @property
    def records(self) -> list[Record]:
        return sorted(self._records.values(), key=lambda r: [str(part) for part in key_of(r)])

    def select(self, benchmark: str, **case: Any) -> list[Record]:
        wanted = {"benchmark": benchmark, **case}
        found = [r for r in self.records if all(r.get(k) == v for k, v in wanted.items())]
        return sorted(found, key=lambda r: (r.get("ranks", 0), r.get("bytes", 0)))

    def find(self, benchmark: str, **case: Any) -> Record | None:
        return next(iter(self.select(benchmark, **case)), None)


# --- words -----------------------------------------------------------------------------------------------------------


def size_name(nbytes: int) -> str:
    """Binary units, as nccl-tests has them."""
    for shift, unit in ((20, "MiB"), (10, "KiB")):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):g} {unit}"
    return f"{nbytes} B"


def time_name(us: float) -> str:
    """Three digits, in the unit that fits."""
    value, unit = (us * 1e3, "ns") if us < 1 else (us, "us") if us < 1e3 else (us / 1e3, "ms")
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    cells = [list(header), *[list(row) for row in rows]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|---" * len(cells[0]) + "|", *lines[1:]]
