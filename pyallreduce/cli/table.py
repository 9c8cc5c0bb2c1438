"""What ``pyallreduce bench`` prints, in the columns of nccl-tests, and writes as JSON."""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
from datetime import datetime
from typing import Any

import torch

from pyallreduce import __version__
from pyallreduce.cli.backends import Backend, gather
from pyallreduce.cli.bench import AVERAGES, Case
from pyallreduce.cli.measure import Result

JSON_VERSION = 1

LEFT = "{:>12}  {:>12}  {:>8}  {:>6}  {:>6}"
LEFT_TITLES = (
    ("size", "count", "type", "redop", "root"),
    ("(B)", "(elements)", "", "", ""),
)
HALF = "  {:>7}  {:>6}  {:>6}  {:>6}"
HALF_TITLES = (
    ("time", "algbw", "busbw", "#wrong"),
    ("(us)", "(GB/s)", "(GB/s)", ""),
)
SPREAD = "  {:>7}" * 4  # with -I
SPREAD_TITLES = (
    ("i_min", "i_max", "i_p99", "i_cv%"),
    ("(us)", "(us)", "(us)", "(%)"),
)


class Table:
    """Prints on rank 0, a line as soon as it is known; the other ranks only count. Collective where it is made."""

    def __init__(self, options: argparse.Namespace, backend: Backend) -> None:
        self._options, self._backend = options, backend
        self._per_iter = bool(options.per_iter_timing)
        self._half = HALF + (SPREAD if self._per_iter else "")
        self._started = now()
        self._rows: list[dict[str, Any]] = []
        self._busbw: list[float] = []
        self.num_wrong = 0
        self._ranks = gather_ranks(backend)
        self._preamble()
        self._titles()

    def _say(self, line: str) -> None:
        if self._backend.rank == 0:
            print(line.rstrip(), flush=True)

    def _preamble(self) -> None:
        options, backend = self._options, self._backend
        factor, nbytes = options.stepfactor, options.stepbytes
        step = f"{factor}(factor)" if factor else f"{nbytes}(bytes)"
        self._say(
            f"# pyallreduce {__version__}, torch {torch.__version__}, backend {options.backend}"
        )
        self._say(f"# Collective test starting: {options.collective}")
        self._say(
            f"# nRanks {backend.size} minBytes {options.minbytes} maxBytes {options.maxbytes} step: {step} "
            f"warmup iters: {options.warmup_iters} iters: {options.iters} validation: {options.check} "
            f"average: {AVERAGES[options.average]}"
        )
        places = "plain tensors; in-place: symmetric memory" if backend.symmetric else "tensors"
        self._say(f"# out-of-place: {places}. All calls use the same buffers (cache-hot)")
        if self._per_iter:
            self._say("# i_*: each call counts with the time of its slowest rank")
        self._say("#")
        self._say("# Using ranks")
        for rank in self._ranks:
            self._say(f"#  Rank {rank['rank']:>2} Pid {rank['pid']:>6} on {rank['hostname']}")
        self._say("#")

    def _titles(self) -> None:
        margin = " " * (len(LEFT.format(*LEFT_TITLES[0])) - 1)
        kind = " (+ per-iteration)" if self._per_iter else ""
        width = len(self._half.format(*[""] * 8))
        self._say(f"#{margin}{'out-of-place' + kind:^{width}}{'in-place' + kind:^{width}}")
        for left, half, spread in zip(LEFT_TITLES, HALF_TITLES, SPREAD_TITLES, strict=True):
            line = LEFT.format(*left) + self._half.format(*half, *spread) * 2
            self._say("#" + line[1:])

    def add(self, case: Case, nbytes: int, count: int, halves: list[Result]) -> None:
        """``halves``: out-of-place, and in-place unless the backend has no symmetric memory."""
        self.num_wrong += sum(result.wrong or 0 for result in halves)
        self._busbw += [result.busbw for result in halves if result.busbw is not None]
        left = (nbytes, count, case.datatype, case.op, case.root)
        cells = [self._cells(result) for result in halves]
        if len(cells) == 1:
            cells.append(["-"] * 8)
        self._say(LEFT.format(*left) + "".join(self._half.format(*half) for half in cells))
        row: dict[str, Any] = dict(
            zip(("size", "count", "type", "redop", "root"), left, strict=True)
        )
        for name, result in zip(("out_of_place", "in_place"), halves, strict=False):
            row |= self._json_of(name, result)
        self._rows.append(row)

    def _cells(self, result: Result) -> list[str]:
        busbw = "-" if result.busbw is None else fixed(result.busbw, 6)
        wrong = "N/A" if result.wrong is None else str(result.wrong)
        cells = [fixed(result.time_s * 1e6, 7), fixed(result.algbw, 6), busbw, wrong]
        if self._per_iter:
            cells += [fixed(value, 7) for value in result.spread().values()]
        return cells

    def _json_of(self, name: str, result: Result) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: {
                "time": result.time_s * 1e6,
                "alg_bw": result.algbw,
                "bus_bw": result.busbw,
                "nwrong": result.wrong,
            }
        }
        if self._per_iter:
            times_us = [1e6 * sample_s for sample_s in result.samples_s]
            found[f"{name}_per_iter"] = {**result.spread(), "times_us": times_us}
        return found

    def end(self) -> None:
        """Prints the footer and writes the JSON file."""
        mean_busbw = statistics.fmean(self._busbw) if self._busbw else None
        verdict = "FAILED" if self.num_wrong else "OK"
        self._say(f"# {'Out of bounds values':<20} : {self.num_wrong} {verdict}")
        self._say(
            f"# {'Avg bus bandwidth':<20} : {'-' if mean_busbw is None else f'{mean_busbw:g}'}"
        )
        self._say("#")
        self._say(f"# Collective test concluded: {self._options.collective}")
        if self._backend.rank == 0 and self._options.json is not None:
            document = self._document(mean_busbw)
            self._options.json.write_text(json.dumps(document, indent=1) + "\n")

    def _document(self, mean_busbw: float | None) -> dict[str, Any]:
        options = self._options
        return {
            "version": JSON_VERSION,
            "start_time": self._started,
            "end_time": now(),
            "args": sys.argv[1:],
            "pyallreduce_version": __version__,
            "torch_version": torch.__version__,
            "config": {
                "collective": options.collective,
                "backend": options.backend,
                "nranks": self._backend.size,
                "minimum_bytes": options.minbytes,
                "maximum_bytes": options.maxbytes,
                "step_factor": options.stepfactor,
                "step_bytes": None if options.stepfactor else options.stepbytes,
                "warmup_iters": options.warmup_iters,
                "iterations": options.iters,
                "validation": options.check,
                "average": AVERAGES[options.average],
                "per_iter_timing": self._per_iter,
                "ranks": self._ranks,
            },
            "results": self._rows,
            "out_of_bounds": {"count": self.num_wrong, "okay": self.num_wrong == 0},
            "average_bus_bandwidth": {"bandwidth": mean_busbw},
        }


def gather_ranks(backend: Backend) -> list[dict[str, Any]]:
    """Collective."""
    text = json.dumps({"pid": os.getpid(), "hostname": socket.gethostname()}).encode()
    mine = torch.zeros(256, dtype=torch.uint8)
    mine[: len(text)] = torch.tensor(list(text))
    rows = gather(backend, mine)
    return [
        {"rank": rank, **json.loads(bytes(row.tolist()).rstrip(b"\0"))}
        for rank, row in enumerate(rows)
    ]


def fixed(value: float, width: int) -> str:
    """With as many of two decimals as fit."""
    texts = [f"{value:.{decimals}f}" for decimals in (2, 1, 0)]
    return next((text for text in texts if len(text) <= width), f"{value:.1e}")


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
