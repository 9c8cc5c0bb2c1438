"""Start the ranks of one host, and end them together. The parent only waits: no heavy imports."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Survivors notice a death within a second and say who died; then they get the signal.
GRACE_S = 3.0
# A rank that ignores SIGTERM, stuck in a file system say, is killed after this.
KILL_AFTER_S = 10.0
OURSELVES = "--nproc"
_MARK = "TRAIN_LAUNCHED_BY_NPROC"
_PR_SET_PDEATHSIG = 1


def launched_by(environ: Mapping[str, str]) -> str | None:
    """The launcher that started this process, by the variable it sets; None if there is none."""
    if _MARK in environ:
        return OURSELVES
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "RANK and WORLD_SIZE"
    if "OMPI_COMM_WORLD_RANK" in environ or "PMI_RANK" in environ:
        return "mpirun"
    batch_step = str(0xFFFFFFFB)  # the script of sbatch itself, which may well use --nproc
    if (
        "SLURM_PROCID" in environ
        and environ.get("SLURM_NTASKS", "1") != "1"
        and environ.get("SLURM_STEP_ID") != batch_step
    ):
        return "srun"
    return None


def announced_rank(environ: Mapping[str, str]) -> int:
    """This process's rank as its launcher says it, before there is a communicator; else 0."""
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if environ.get(name, "").isdigit():
            return int(environ[name])
    return int(environ["SLURM_PROCID"]) if launched_by(environ) == "srun" else 0


def run_ranks(arguments: Sequence[str], nproc: int) -> int:
    """Run `python -m train ARGUMENTS` as `nproc` ranks on this host; returns the exit code.

    That of the first rank to fail (128 + signal if a signal ended it), else 0. When a rank fails
    the others are ended; signals to this process go to all of them; they do not outlive it.
    """
    port = free_port()
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        children += (_start(arguments, rank, nproc, port) for rank in range(nproc))
        failed = _first_failure(children)
        if failed is not None:
            _end(children)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
    if failed is None:
        return 0
    return 128 - failed if failed < 0 else failed


def _start(arguments: Sequence[str], rank: int, nproc: int, port: int) -> subprocess.Popen[bytes]:
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    environ = {
        "OMP_NUM_THREADS": str(threads),  # more would fight over the same cores
        "PYALLREDUCE_PORT": str(port),  # its default, MASTER_PORT + 1, may be taken
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        _MARK: "1",
    }
    # Away from the terminal: Ctrl-C reaches a rank once, through us, not also from the terminal.
    return subprocess.Popen(
        [sys.executable, "-m", "train", *arguments],
        env=environ,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _first_failure(children: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all have ended well (None) or one has not (its return code)."""
    while True:
        codes = [child.poll() for child in children]
        for code in codes:
            if code:
                return code
        if None not in codes:
            return None
        time.sleep(0.05)


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let the others report the failure, then SIGTERM, then SIGKILL."""
    if _all_ended(children, GRACE_S):
        return
    for child in children:
        if child.poll() is None:
            child.terminate()
    _all_ended(children, KILL_AFTER_S)


def _all_ended(children: Sequence[subprocess.Popen[bytes]], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if all(child.poll() is not None for child in children):
            return True
        time.sleep(0.05)
    return False


def free_port() -> int:
    """A port that was free a moment ago. Losing a race for it fails loudly in rank 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
