"""Ranks that share one GPU: how NCCL is told to bear it, and how they are started and awaited."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.program import die_with_parent

TAIL = 600  # characters of a rank's last words

LOOPBACK = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
# Contexts that share one GPU's multiprocessors wait for each other less if each takes few; a switch across several GPUs
# (NVLS) there cannot be.
MODEST = {"NCCL_MAX_CTAS": "2", "NCCL_NVLS_ENABLE": "0"}


@dataclass(frozen=True)
class Way:
    """``per_rank``: variables with the rank in them. ``control``: expected to be refused; says what a version does."""

    name: str
    backend: str
    env: dict[str, str] = field(default_factory=dict)
    per_rank: dict[str, str] = field(default_factory=dict)
    control: bool = False


# Each rank a host of its own: nothing is found to be a duplicate, and ranks talk through sockets on the loopback.
HOSTS = Way(
    "nccl, a host id per rank",
    "nccl",
    env=MODEST
    | {
        "NCCL_NET": "Socket",
        "NCCL_NET_PLUGIN": "none",
        "NCCL_IB_DISABLE": "1",
        "NCCL_MNNVL_ENABLE": "0",  # or two "hosts" with one fabric would try to map each other's memory
        "NCCL_RAS_ENABLE": "0",
    },
    per_rank={"NCCL_HOSTID": "rank-{rank}"},
)
# Of NCCL 2.30.3 and later, experimental.
SWITCH = Way(
    "nccl, multi-rank switch",
    "nccl",
    env=MODEST | {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NET_GDR_LEVEL": "LOC"},
)
PLAIN = Way("nccl, as it comes", "nccl", control=True)
GLOO = Way("gloo, through the host", "gloo")


def environment_of(way: Way, rank: int) -> dict[str, str]:
    own = {name: value.format(rank=rank) for name, value in way.per_rank.items()}
    return {**LOOPBACK, **way.env, **own}


def last_words(output: str) -> str:
    """NCCL's reason where it gives one, else the end. What NCCL begins its lines with names the host."""
    lines = [re.sub(r"^\S+:\d+:\d+ ", "", line) for line in output.splitlines() if line.strip()]
    reasons = [line for line in lines if "NCCL WARN" in line or "rror:" in line]
    return "\n".join((reasons or lines)[-3:])[-TAIL:]


def _gather(processes: list[subprocess.Popen[bytes]], limit_s: float) -> list[int | None]:
    """Exit codes; None for a rank that did not end in time. When one has failed, the others get little more time."""
    deadline = time.monotonic() + limit_s
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            deadline = min(deadline, time.monotonic() + 3.0)
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    codes = [process.poll() for process in processes]
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
    return codes


def run_ranks(
    way: Way, size: int, arguments: Sequence[str], folder: str, limit_s: float
) -> tuple[list[int | None], list[str]]:
    """``python ARGUMENTS --rank R --size SIZE --folder FOLDER`` for every rank: exit codes (None: late) and output."""
    processes, outputs = [], []
    for rank in range(size):
        outputs.append(Path(folder, f"rank-{rank}"))
        own = ["--rank", str(rank), "--size", str(size), "--folder", folder]
        with outputs[-1].open("wb") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *arguments, *own],
                    env={**os.environ, "NCCL_DEBUG": "WARN", **environment_of(way, rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    preexec_fn=die_with_parent,
                )
            )
    codes = _gather(processes, limit_s)
    return codes, [path.read_text(errors="replace") for path in outputs]
