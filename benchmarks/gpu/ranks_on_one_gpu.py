"""Which ways let several ranks share one GPU: for how many ranks, with right results, and how long a call takes.

NCCL refuses two ranks on one GPU of one host (versions 2.26 to 2.29 with "Duplicate GPU detected"). Ways round it, and
what to fall back on, are tried one after the other, each with fresh processes and a time limit; one row each. The times
are no benchmark: without MPS the ranks' contexts take turns on the GPU. Passes if a way works for two ranks and none
gives wrong results. ``--dry-run``: gloo on the CPU runs, of the others it says what they would.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from benchmarks.gpu.program import emit, seconds_left
from benchmarks.gpu.ranks import (
    GLOO,
    HOSTS,
    PLAIN,
    SWITCH,
    Way,
    environment_of,
    last_words,
    run_ranks,
)

WAY_LIMIT_S = 25.0
CALL_LIMIT_S = 15.0  # of a collective, by its own watchdog
SIZES = (1 << 10, 1 << 20, 25_557_032)  # elements; the last is ResNet-50
CALLS = 3

# The likeliest first: a stage that runs out of time loses the least.
TRIALS = (
    (HOSTS, 2),
    (GLOO, 2),
    (HOSTS, 4),
    (SWITCH, 2),
    (PLAIN, 2),
    (SWITCH, 4),
    (GLOO, 4),
)


# --- a rank ----------------------------------------------------------------------------------------------------------


def _pattern(rank: int, numel: int, device: str) -> Any:
    """Differs by element and by rank; sums of 4 ranks are exact in float32."""
    import torch

    return (torch.arange(numel, device=device) % 1021 + 1).float() * (rank + 1)


def operations(rank: int, size: int, device: str) -> dict[str, Callable[[int], tuple[Any, Any]]]:
    """By name: what does it on ``numel`` elements and returns what came out, and what should have."""
    import torch
    import torch.distributed as dist

    def all_reduce(numel: int) -> tuple[Any, Any]:
        data = _pattern(rank, numel, device)
        dist.all_reduce(data)
        return data, _pattern(0, numel, device) * (size * (size + 1) // 2)

    def broadcast(numel: int) -> tuple[Any, Any]:
        data = _pattern(rank, numel, device)
        dist.broadcast(data, src=size - 1)
        return data, _pattern(size - 1, numel, device)

    def all_gather(numel: int) -> tuple[Any, Any]:
        data = torch.empty(size * numel, device=device)
        dist.all_gather_into_tensor(data, _pattern(rank, numel, device))
        return data, torch.cat([_pattern(r, numel, device) for r in range(size)])

    def reduce_scatter(numel: int) -> tuple[Any, Any]:
        data = torch.empty(numel, device=device)
        dist.reduce_scatter_tensor(data, _pattern(rank, size * numel, device))
        whole = _pattern(0, size * numel, device) * (size * (size + 1) // 2)
        return data, whole[rank * numel : (rank + 1) * numel]

    return {f.__name__: f for f in (all_reduce, broadcast, all_gather, reduce_scatter)}


def _timed_ms(rank: int, numel: int, device: str) -> float:
    """Median of some all-reduces."""
    import torch
    import torch.distributed as dist

    data = _pattern(rank, numel, device)
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        dist.all_reduce(data)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def run_rank(rank: int, size: int, backend: str, device: str, folder: str) -> None:
    """One row: right elements by operation, or why it cannot be done; milliseconds of an all-reduce by its elements."""
    import torch
    import torch.distributed as dist

    options = {}
    if device == "cuda":
        torch.cuda.set_device(0)
        if backend == "nccl":
            options["device_id"] = torch.device("cuda", 0)  # connects now: a refusal shows here
    limit = timedelta(seconds=CALL_LIMIT_S)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=limit, **options
    )
    wrong: dict[str, int | str] = {}
    for name, operation in operations(rank, size, device).items():
        try:
            found, expected = operation(SIZES[0] + 3)
            wrong[name] = int((found != expected).sum())
        except (RuntimeError, ValueError) as error:  # gloo does not do all of them on a GPU
            wrong[name] = f"{type(error).__name__}: {str(error)[:200]}"
    milliseconds = {}
    for numel in SIZES if device == "cuda" else SIZES[:1]:
        found, expected = operations(rank, size, device)["all_reduce"](numel)
        wrong[f"all_reduce of {numel}"] = int((found != expected).sum())
        milliseconds[str(numel)] = round(_timed_ms(rank, numel, device), 3)
    emit(wrong=wrong, all_reduce_ms=milliseconds)
    dist.destroy_process_group()


# --- all ranks of a way ----------------------------------------------------------------------------------------------


def try_way(way: Way, size: int, device: str) -> dict[str, Any]:
    """Starts the ranks; the row of this way."""
    start = time.monotonic()
    arguments = ["-m", "benchmarks.gpu.ranks_on_one_gpu", "--backend", way.backend]
    arguments += ["--device", device]
    with tempfile.TemporaryDirectory() as folder:
        codes, texts = run_ranks(way, size, arguments, folder, WAY_LIMIT_S)
    reports = [_report_of(text) for text in texts]
    row: dict[str, Any] = {
        "way": way.name,
        "ranks": size,
        "control": way.control,
        "exits": codes,
        "seconds": round(time.monotonic() - start, 1),
        "env": environment_of(way, 0),
    }
    if any(codes) or None in codes or None in reports:
        failing = next(i for i in range(size) if codes[i] != 0 or reports[i] is None)
        return row | {"works": False, "wrong": False, "why": last_words(texts[failing])}
    found = [report["wrong"] for report in reports if report is not None]
    counts = [n for report in found for n in report.values() if isinstance(n, int)]
    cannot = {name: n for name, n in found[0].items() if isinstance(n, str)}
    return row | {
        "works": not any(counts),
        "wrong": any(counts),
        "wrong_elements": found,
        "cannot": cannot,
        "all_reduce_ms": reports[0]["all_reduce_ms"] if reports[0] else {},
    }


def _report_of(text: str) -> dict[str, Any] | None:
    lines = [line for line in text.splitlines() if line.startswith('{"wrong"')]
    return json.loads(lines[-1]) if lines else None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--rank", type=int, help="be this rank; started by the program itself")
    parser.add_argument("--size", type=int)
    parser.add_argument("--backend")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder")
    given = parser.parse_args()
    if given.rank is not None:
        run_rank(given.rank, given.size, given.backend, given.device, given.folder)
        return 0
    rows = []
    for way, size in TRIALS:
        if given.dry_run and (way.backend != "gloo" or size > 2):
            emit(way=way.name, ranks=size, would_run=environment_of(way, 0), backend=way.backend)
            continue
        if seconds_left() < WAY_LIMIT_S:
            emit(way=way.name, ranks=size, untried=f"{seconds_left():.0f} s are left")
            continue
        rows.append(try_way(way, size, "cpu" if given.dry_run else "cuda"))
        emit(**rows[-1])
    working = [f"{row['way']} ({row['ranks']} ranks)" for row in rows if row["works"]]
    wrong = [f"{row['way']} ({row['ranks']} ranks)" for row in rows if row["wrong"]]
    verdict = f"works: {'; '.join(working) or 'nothing'}"
    emit(says=verdict + (f"; WRONG RESULTS: {'; '.join(wrong)}" if wrong else ""))
    return 0 if any(row["works"] and row["ranks"] == 2 for row in rows) and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
