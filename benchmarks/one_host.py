"""All-reduce on one host: ours, gloo (what DDP uses on CPUs) and the floor, interleaved in one run, results verified.

    python -m benchmarks.one_host            # prints a Markdown table, appends JSON lines to benchmarks/results/

Each figure is the median over blocks of each block's median, in microseconds; busbw = bytes / time * 2(n-1)/n.
Every rank rewrites its buffer before each call, as backward does, and checks the result after each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import pyallreduce as par

HERE = Path(__file__).parent
CASES = [(2, 4 << 10), (2, 25 << 20), (4, 4 << 10), (4, 25 << 20)]
METHODS = ["symmetric", "plain tensor", "gloo"]


def measure(rank: int, n: int, nbytes: int, blocks: int, path: str) -> None:
    """In each of n processes: ``blocks`` rounds over all methods; rank 0 writes the samples as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{path}.gloo", rank=rank, world_size=n, timeout=timedelta(seconds=60)
    )
    comm = par.init(store=dist.FileStore(f"{path}.store", n), rank=rank, size=n)
    numel, calls = nbytes // 4, 200 if nbytes < 1 << 20 else 5
    plain, symmetric = torch.empty(numel), comm.symmetric_empty(numel)
    methods: dict[str, tuple[torch.Tensor, Callable[[], Any]]] = {
        "symmetric": (symmetric, lambda: comm.all_reduce(symmetric, "avg")),
        "plain tensor": (plain, lambda: comm.all_reduce(plain, "avg")),
        "gloo": (plain, lambda: dist.all_reduce(plain)),
    }
    samples: dict[str, list[float]] = {name: [] for name in methods}
    for block in range(-1, blocks):  # block -1 warms up
        for name, (tensor, call) in methods.items():
            times = []
            for i in range(calls):
                tensor.fill_(rank + 1 + i % 3)
                comm.barrier()
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
                right = (n + 1) / 2 + i % 3
                right *= n if name == "gloo" else 1
                assert (tensor == right).all(), name
            if block >= 0:
                samples[name].append(statistics.median(times))
    if rank == 0:
        Path(path).write_text(json.dumps(samples))
    comm.close()
    dist.destroy_process_group()


def floor_s(program: Path, n: int, nbytes: int, blocks: int) -> list[float]:
    rounds = 50 if nbytes >= 1 << 20 else 2000
    medians = []
    for _ in range(blocks):
        command = [str(program), str(n), str(nbytes), str(rounds)]
        lines = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=60
        ).stdout
        medians.append(statistics.median(float(line) for line in lines.split()))
    return medians


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "isa": par._core.kernels.active_isa(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=9, help="interleaved blocks (default 9)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "one_host.jsonl")
    options = parser.parse_args()
    about = machine()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "floor"
        compile_floor = ["g++", "-O3", "-march=native", "-std=c++20", str(HERE / "floor.cpp")]
        subprocess.run([*compile_floor, "-o", str(program)], check=True)
        for n, nbytes in CASES:
            path = f"{folder}/{n}-{nbytes}"
            floor = floor_s(program, n, nbytes, options.blocks // 2 + 1)
            mp.spawn(measure, (n, nbytes, options.blocks, path), nprocs=n)
            floor += floor_s(program, n, nbytes, options.blocks // 2 + 1)
            samples = json.loads(Path(path).read_text()) | {"floor": floor}
            rows.append(
                {
                    "benchmark": "all_reduce",
                    "ranks": n,
                    "bytes": nbytes,
                    "dtype": "float32",
                    "time_us": {k: statistics.median(v) * 1e6 for k, v in samples.items()},
                    "spread_us": {k: [min(v) * 1e6, max(v) * 1e6] for k, v in samples.items()},
                    "blocks": options.blocks,
                    **about,
                }
            )
    options.output.parent.mkdir(exist_ok=True)
    with options.output.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(table(rows))
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    names = ["floor", *METHODS]
    lines = [
        f"{rows[0]['cpu']}, {rows[0]['cores']} cores, torch {rows[0]['torch']}, commit {rows[0]['commit']}",
        "",
        "| all-reduce, float32 | "
        + " | ".join(f"{name}, us" for name in names)
        + " | gloo / symmetric |",
        "|---" * (len(names) + 2) + "|",
    ]
    for row in rows:
        us = row["time_us"]
        size = (
            f"{row['bytes'] >> 20} MiB" if row["bytes"] >= 1 << 20 else f"{row['bytes'] >> 10} KiB"
        )
        cells = [f"{us[name]:,.1f}" if us[name] < 1000 else f"{us[name]:,.0f}" for name in names]
        ratio = us["gloo"] / us["symmetric"]
        lines.append(f"| {size}, {row['ranks']} ranks | {' | '.join(cells)} | {ratio:.0f} x |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
