"""The whole matrix, how long each kind of fault took to be known, and a file with the figures.

python -m tests.chaos                           # make chaos
python -m tests.chaos kill-in_reduction-2-eager-0-1 ...      # these cases, as they are named in a complaint
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from benchmarks.harness import machine, markdown, slug
from tests.ranks import free_port_pair

from .cases import DIMENSIONS, Case, matrix
from .judge import complaints, detection_s
from .server import Server

VERSION = 1  # of the JSON lines
DEATHS = ("kill", "exit", "os_exit", "exception", "out_of_memory")
RESULTS = Path("benchmarks/results")
MIN_FAULTS = 1000  # fewer say nothing of a p99

Line = dict[str, Any]


class Log:
    """A line per case that has run, in the order of their ends."""

    def __init__(self, path: Path | None) -> None:
        self.lines: list[Line] = []
        self._file: TextIO | None = None
        self._lock = threading.Lock()
        if path is not None:
            if path.exists():
                self.lines = [json.loads(line) for line in path.read_text().splitlines()]
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a")

    def add(self, case: Case, facts: dict[str, Any]) -> None:
        line = {
            "case": str(case),
            "fault": case.fault,
            "timeout_s": case.timeout_s,
            "detection_s": detection_s(case, facts),
            "wall_s": facts["wall_s"],
            "complaints": complaints(case, facts),
        }
        with self._lock:
            self.lines.append(line)
            if self._file is not None:
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()
            report_case(len(self.lines), line, facts)


def report_case(number: int, line: Line, facts: dict[str, Any]) -> None:
    if not line["complaints"]:
        if number % 50 == 0:
            print(f"{number} cases", flush=True)
        return
    print(f"{line['case']}:")
    for text in line["complaints"]:
        print(f"    {text}")
    for rank, record in enumerate(facts["records"]):
        print(f"    --- record of rank {rank}: {json.dumps(record)}")
    for rank, text in enumerate(facts["stderr"]):
        if text:
            print(f"    --- stderr of rank {rank}, its end\n{text[-2000:]}")
    sys.stdout.flush()


def run(cases: Iterable[Case], jobs: int, until_s: float, log: Log) -> None:
    """``jobs`` cases at a time, each thread with a fork server of its own."""
    waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in cases:
        waiting.put(case)

    def serve() -> None:
        with Server(free_port_pair()) as server:
            while time.monotonic() < until_s:
                try:
                    case = waiting.get_nowait()
                except queue.Empty:
                    return
                log.add(case, server.run(case))

    threads = [threading.Thread(target=serve) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def summary(name: str, lines: list[Line]) -> Line:
    """Of one kind of fault: milliseconds from it until the last survivor had raised; of silence, beyond the timeout."""
    samples = sorted(
        line["detection_s"] - (line["timeout_s"] if line["fault"] == "stop" else 0.0)
        for line in lines
        if line["detection_s"] is not None
    )

    def quantile_ms(q: float) -> float | None:
        if not samples:
            return None
        return round(1e3 * samples[max(0, math.ceil(q * len(samples)) - 1)], 1)

    return {
        "fault": name,
        "faults": len(lines),
        "failed": sum(bool(line["complaints"]) for line in lines),
        "p50_ms": quantile_ms(0.5),
        "p99_ms": quantile_ms(0.99),
        "max_ms": quantile_ms(1.0),
    }


def summaries(lines: list[Line]) -> list[Line]:
    by_fault = {
        fault: [line for line in lines if line["fault"] == fault] for fault in DIMENSIONS["fault"]
    }
    deaths = [line for line in lines if line["fault"] in DEATHS]
    rows = [summary(fault, chosen) for fault, chosen in by_fault.items() if chosen]
    return [*rows, summary("all deaths", deaths)] if deaths else rows


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__.splitlines()[0]
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: the whole matrix")
    parser.add_argument("--seeds", type=int, default=2, help="of the matrix (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=2, help="cases at a time (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no case after that")
    parser.add_argument("--log", type=Path, help="a line per case; those in it are not run again")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the figures (%(default)s)"
    )
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)

    log = Log(options.log)
    known = {line["case"] for line in log.lines}
    everything = [case for seed in range(options.seeds) for case in matrix(seed)]
    chosen = [Case.named(name) for name in options.cases] or everything
    run(
        (case for case in chosen if str(case) not in known),
        options.jobs,
        time.monotonic() + 60 * options.minutes,
        log,
    )

    rows = summaries(log.lines)
    columns = ["fault", "faults", "failed", "p50_ms", "p99_ms", "max_ms"]
    print("\n".join(markdown(columns, [[str(row[c]) for c in columns] for row in rows])))
    seconds = sum(line["wall_s"] for line in log.lines)
    print(f"{len(log.lines)} faults, {seconds / max(1, len(log.lines)):.2f} s each")
    if not options.cases and len(log.lines) >= MIN_FAULTS:
        about = machine()
        path = options.results / f"chaos-{slug(about)}.jsonl"
        common = {"version": VERSION, "benchmark": "chaos"}
        circumstances = {"seeds": options.seeds, "jobs": options.jobs, "machine": about}
        path.write_text(
            "".join(json.dumps({**common, **row, **circumstances}) + "\n" for row in rows)
        )
        print(path)
    return 1 if any(line["complaints"] for line in log.lines) else 0


if __name__ == "__main__":
    sys.exit(main())
