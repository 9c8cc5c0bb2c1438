"""Ranks as processes. A fork server that has imported torch once keeps a start below 50 ms per rank."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing as mp
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

SAMPLE_S = 0.1
_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["preloaded", "ranks"])


def ensure_server() -> None:
    """Starts the fork server, if need be, so that it finds our modules: before Python 3.13 by PYTHONPATH alone.

    What it does not find it goes without, in silence.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [os.path.dirname(os.path.abspath(__file__)), before])
    )
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


@dataclass
class Outcome:
    """How one rank ended: with a value, with an error, or (both None) killed or without a word."""

    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    exitcode: int | None = None
    ended_s: float = 0.0  # time.monotonic()
    queued_s: float = 0.0  # in its life without the last SAMPLE_S: it is reaped at once


def run_ranks(
    n: int,
    fn: Callable[..., Any],
    *args: Any,
    deadline_s: float = 60.0,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """``fn(rank, n, *args)`` in n processes in which ``par.init()`` works; the results in rank order."""
    outcomes = outcomes_of(n, fn, *args, deadline_s=deadline_s, env=env)
    failed = [r for r, o in enumerate(outcomes) if o.error is not None or o.exitcode != 0]
    assert not failed, "\n".join(
        f"--- rank {r}, exit code {outcomes[r].exitcode}\n{outcomes[r].trace}" for r in failed
    )
    return [o.value for o in outcomes]


def outcomes_of(
    n: int,
    fn: Callable[..., Any],
    *args: Any,
    deadline_s: float = 60.0,
    env: dict[str, str] | None = None,
    started: Callable[[list[int]], None] | None = None,
) -> list[Outcome]:
    """The same, with every rank's outcome. ``started`` gets the pids, to kill or stop some of them."""
    variables = {
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port_pair()),
        "OMP_NUM_THREADS": "1",
        **(env or {}),
    }
    ensure_server()
    processes, pipes = [], []
    for rank in range(n):
        mine, theirs = _context.Pipe(duplex=False)
        mark = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = _context.Process(target=_run_rank, args=(theirs, rank, n, mark, fn, args))
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(mine)
    if started is not None:
        started([process.pid for process in processes])
    outcomes = [Outcome() for _ in range(n)]
    give_up_at = time.monotonic() + deadline_s
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes and time.monotonic() < give_up_at:
        for rank in open_pipes.values():
            outcomes[rank].queued_s = max(outcomes[rank].queued_s, queued_s(processes[rank].pid))
        for pipe in wait(list(open_pipes), timeout=SAMPLE_S):
            rank = open_pipes.pop(pipe)
            outcomes[rank].ended_s = time.monotonic()
            try:
                value, error, outcomes[rank].trace = pickle.loads(pipe.recv_bytes())
            except EOFError:
                continue
            outcomes[rank].value, outcomes[rank].error = value, error
    late = sorted(open_pipes.values())
    # Their stacks, to stderr; then the end of what we have started, and of nothing else.
    for rank in late:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(processes[rank].pid, signal.SIGCONT)
            os.kill(processes[rank].pid, signal.SIGUSR1)
    if late:
        time.sleep(0.5)
    for rank, process in enumerate(processes):
        if rank in late:
            process.kill()
        process.join(10)
        if process.exitcode is None:
            process.kill()
            process.join()
        outcomes[rank].exitcode = process.exitcode
        process.close()
        pipes[rank].close()
    if late and started is None:
        raise AssertionError(
            "\n".join(
                [
                    f"ranks {late} had not ended after {deadline_s} s; their stacks are on stderr",
                    *(
                        f"--- rank {r} had ended\n{o.trace}"
                        for r, o in enumerate(outcomes)
                        if o.trace
                    ),
                ]
            )
        )
    return outcomes


def queued_s(pid: int | str = "self") -> float:
    """How long a process's main thread has been ready while others had the cores; 0 if nobody tells."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) * 1e-9
    return 0.0


def free_port_pair() -> int:
    """A port p such that p and p + 1 are free: torch's rendezvous and ours."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port
    raise RuntimeError("no two neighbouring free ports in 100 tries")


def _run_rank(
    pipe: Connection,
    rank: int,
    n: int,
    variables: dict[str, str],
    fn: Callable[..., Any],
    args: Any,
) -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ.update(variables)
    import torch

    torch.set_num_threads(1)
    try:
        message = (fn(rank, n, *args), None, "")
    except BaseException as error:
        message = (None, error, traceback.format_exc())
    try:
        data = pickle.dumps(message)
    except Exception as error:
        data = pickle.dumps((None, RuntimeError(f"{error}: cannot pickle {message!r}"), message[2]))
    pipe.send_bytes(data)
    pipe.close()
