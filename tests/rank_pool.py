"""Ranks that stay: processes that run one function after another on one communicator. Starting them costs far more
than the small programs that property tests run by the hundred."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import ranks


class RankPool:
    """n ranks, started when first needed and again after a failure."""

    def __init__(self, size: int, timeout_s: float = 20.0) -> None:
        self.size, self._timeout_s = size, timeout_s
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, fn: Callable[..., Any], *args: Any, deadline_s: float = 60.0) -> list[Any]:
        """``fn(comm, *args)`` on every rank; the results in rank order. The first error fails the test."""
        if not self._processes:
            self._start()
        order = pickle.dumps((fn, args))
        for pipe in self._pipes:
            pipe.send_bytes(order)
        values: dict[int, Any] = {}
        give_up_at = time.monotonic() + deadline_s
        while len(values) < self.size:
            waiting = {pipe: r for r, pipe in enumerate(self._pipes) if r not in values}
            ready = wait(list(waiting), timeout=max(0.0, give_up_at - time.monotonic()))
            if not ready:
                self._fail(f"ranks {sorted(waiting.values())} had not ended after {deadline_s} s")
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    values[rank], trace = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    trace = "ended without a word"
                if trace:
                    self._fail(f"rank {rank} of {self.size}: {trace}")
        return [values[rank] for rank in range(self.size)]

    def close(self) -> None:
        """Ends the processes that this pool has started, and no other."""
        for pipe in self._pipes:
            pipe.close()  # the end of their input
        for process in self._processes:
            process.join(5)
            if process.exitcode is None:
                process.kill()
                process.join()
            process.close()
        self._processes, self._pipes = [], []

    def _fail(self, message: str) -> None:
        for process in self._processes:
            process.kill()
        self.close()
        raise AssertionError(message)

    def _start(self) -> None:
        variables = {
            "WORLD_SIZE": str(self.size),
            "LOCAL_WORLD_SIZE": str(self.size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(ranks.free_port_pair()),
            "OMP_NUM_THREADS": "1",
        }
        ranks.ensure_server()
        for rank in range(self.size):
            mine, theirs = ranks._context.Pipe()
            marks = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = ranks._context.Process(
                target=_serve, args=(theirs, marks, self._timeout_s), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)


def _serve(pipe: Connection, marks: dict[str, str], timeout_s: float) -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ.update(marks)
    import torch

    import pyallreduce as par

    torch.set_num_threads(1)
    comm = par.init(timeout_s=timeout_s)
    while True:
        try:
            fn, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = (fn(comm, *args), "")
        except BaseException:
            answer = (None, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
