"""Start ranks on this host, and end them together."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from types import FrameType

from pyallreduce.launch import OWN_PORT_OFFSET

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The others notice a death within a second, and say who died; then they are ended.
GRACE_S = 3.0
POLL_S = 0.02
_PR_SET_PDEATHSIG = 1

_Child = subprocess.Popen[bytes]


def run_local_ranks(command: Sequence[str], size: int) -> int:
    """Runs ``command`` as ``size`` ranks that find each other as under torchrun; returns the exit code.

    That of the first rank to fail (1 if it was killed), else 0. A signal to this process goes to all ranks, and 128 +
    its number is returned. No rank outlives the call.
    """
    port = free_port()
    children: list[_Child] = []
    signals: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        children += (_start(command, rank, size, port) for rank in range(size))
        failed = _first_failure(children)
        if failed:
            _wait(children, GRACE_S)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
    return 128 + signals[0] if signals else max(failed, 1) if failed else 0


def free_port() -> int:
    """A port that was free a moment ago, and so was the one on which the rendezvous listens."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + OWN_PORT_OFFSET))
            except (OSError, OverflowError):
                continue
            return port


def _start(command: Sequence[str], rank: int, size: int, port: int) -> _Child:
    threads = max(1, len(os.sched_getaffinity(0)) // size)
    environ = {
        "OMP_NUM_THREADS": str(threads),  # more would fight over the same cores
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # In a session of its own: Ctrl-C reaches a rank once, through us, not also from the terminal.
    return subprocess.Popen(
        command, env=environ, start_new_session=True, preexec_fn=_die_with_parent
    )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _first_failure(children: Sequence[_Child]) -> int:
    """Waits until one has failed (its return code), or all have ended well (0)."""
    while True:
        codes = [child.poll() for child in children]
        failed = next((code for code in codes if code), 0)
        if failed or None not in codes:
            return failed
        time.sleep(POLL_S)


def _wait(children: Sequence[_Child], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(POLL_S)
