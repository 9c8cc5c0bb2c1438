"""The fork server: it has imported torch once, and for each case forks the ranks, directs them and collects facts.

It is the subreaper of all that descends from it, so that also orphans cannot hide. ``Server`` is its handle in another
process; a line of JSON each way per case.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import kernel_view
from .cases import PATIENT_S, Case

MOMENT_S = 10.0  # within which the ranks must have reached the moment
CASE_S = MOMENT_S + PATIENT_S + 5.0
LEFTOVERS_S = 3.0  # orphaned DataLoader workers look for their parent now and then
WORKERS_LOOK_S = 0.1
PR_SET_CHILD_SUBREAPER = 36

Facts = dict[str, Any]


class Server:
    """One fork server. Its jobs meet at ``port`` and the next, again and again: none may leave it occupied."""

    def __init__(self, port: int) -> None:
        package = __package__ or ""
        root = Path(__file__).parents[package.count(".") + 1]
        paths = [str(root), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{package}.server", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "OMP_NUM_THREADS": "1",
            },
        )

    def run(self, case: Case) -> Facts:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(case)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the fork server has ended in case {case}"
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(CASE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- in the server ---------------------------------------------------------------------------------------------------


class Job:
    """The ranks of one case, seen from outside."""

    def __init__(self, case: Case, port: int) -> None:
        from .rank import Board

        self.case, self.port = case, port
        self.board = Board(case.size)
        self.pids: list[int] = []
        self._gates = [os.pipe() for _ in range(case.size)]
        self._orders = [os.pipe() for _ in range(case.size)]
        self._results = [os.pipe() for _ in range(case.size)]
        self._stderr = [tempfile.TemporaryFile() for _ in range(case.size)]  # noqa: SIM115
        self.records: list[bytes] = [b""] * case.size
        self.ended_s: list[float] = [0.0] * case.size
        self.exit_codes: list[int | None] = [None] * case.size

    def fork(self) -> int | None:
        """In the children their rank."""
        for rank in range(self.case.size):
            pid = os.fork()
            if pid == 0:
                return rank
            self.pids.append(pid)
        for _, result in self._results:
            os.close(result)
        return None

    def become(self, rank: int) -> None:
        """In a child."""
        from .rank import run_rank

        for pipes, mine in ((self._gates, 0), (self._orders, 0), (self._results, 1)):
            for r, ends in enumerate(pipes):
                for which, end in enumerate(ends):
                    if r != rank or which != mine:
                        with suppress(OSError):
                            os.close(end)
        os.dup2(self._stderr[rank].fileno(), 2)
        os.dup2(2, 1)
        for file in self._stderr:
            file.close()
        n = str(self.case.size)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=n,
            LOCAL_WORLD_SIZE=n,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(self.port),
        )
        run_rank(
            self.case,
            rank,
            self.board,
            self._gates[rank][0],
            self._orders[rank][0],
            self._results[rank][1],
        )

    def order(self, rank: int, order: bytes) -> None:
        os.write(self._orders[rank][1], order)

    def open_gate(self, rank: int) -> None:
        os.write(self._gates[rank][1], b"g")

    def collect(self, until: Callable[[], bool], deadline: float) -> bool:
        """Reads results and ends until there are enough of them."""
        while not until():
            pidfds = {
                os.pidfd_open(pid): rank
                for rank, pid in enumerate(self.pids)
                if self.exit_codes[rank] is None
            }
            pipes = {read: rank for rank, (read, _) in enumerate(self._results) if read >= 0}
            left_s = deadline - time.monotonic()
            ready, _, _ = select.select([*pidfds, *pipes], [], [], max(0.0, left_s))
            for fd in ready:
                if fd in pidfds:
                    self._reap(pidfds[fd])
                elif data := os.read(fd, 1 << 16):
                    self.records[pipes[fd]] += data
                else:
                    os.close(fd)
                    self._results[pipes[fd]] = (-1, -1)
            for fd in pidfds:
                os.close(fd)
            if not ready:
                return False
        return True

    def _reap(self, rank: int) -> None:
        self.ended_s[rank] = time.monotonic()
        _, status = os.waitpid(self.pids[rank], 0)
        self.exit_codes[rank] = os.waitstatus_to_exitcode(status)

    def alive(self) -> list[int]:
        return [rank for rank, code in enumerate(self.exit_codes) if code is None]

    def end(self) -> list[str]:
        """Ends what should have ended by itself: all of it ours. Returns what each rank wrote to stderr."""
        for rank in self.alive():
            for number in (signal.SIGCONT, signal.SIGUSR2):
                os.kill(self.pids[rank], number)
        if self.alive():
            time.sleep(0.3)
        for rank in self.alive():
            os.kill(self.pids[rank], signal.SIGKILL)
        self.collect(lambda: not self.alive(), time.monotonic() + 5)
        for pipes in (self._gates, self._orders, self._results):
            for ends in pipes:
                for end in ends:
                    with suppress(OSError):
                        os.close(end)
        texts = []
        for file in self._stderr:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return texts


def is_reached(job: Job) -> bool:
    """The ranks stand where the case wants them. Each part of the answer stays true until somebody is struck or let go;
    so the moment is certain."""
    from .rank import Board

    case, board, pids = job.case, job.board, job.pids
    victim, other = case.victim, case.other

    def is_in_trap(rank: int) -> bool:
        return board.trap_is_set(rank) and kernel_view.is_trapped(pids[rank])

    match case.moment:
        case "before_first":
            survivors = [pid for rank, pid in enumerate(pids) if rank != victim]
            return board.state(victim) == Board.AT_GATE and (
                not case.survivors_wait or all(map(kernel_view.waits_for_a_rank, survivors))
            )
        case "waiting_for_peers":
            return board.state(other) == Board.AT_GATE and kernel_view.waits_for_a_rank(
                pids[victim]
            )
        case "in_reduction":
            return is_in_trap(victim)
        case "waiting_for_end":
            return is_in_trap(other) and kernel_view.waits_for_a_rank(pids[victim])
        case "between_buckets":
            return board.state(victim) == Board.AT_GATE
        case "in_close":
            if board.state(victim) == Board.AT_GATE and is_in_trap(victim):
                job.open_gate(victim)
            return board.state(victim) == Board.CLOSING and kernel_view.main_thread_waits(
                pids[victim]
            )
    raise ValueError(case.moment)


def strike(job: Job) -> None:
    pid = job.pids[job.case.victim]
    match job.case.fault:
        case "kill":
            job.board.strike(job.case.victim)
            os.kill(pid, signal.SIGKILL)
        case "stop":
            job.board.strike(job.case.victim)
            os.kill(pid, signal.SIGSTOP)
        case "out_of_memory":
            children = kernel_view.children_of(pid)
            job.board.strike(job.case.victim)
            for each in (*children, pid):
                os.kill(each, signal.SIGKILL)
        case "os_exit":
            job.order(job.case.victim, b"x")
        case "exit" | "exception":
            os.kill(pid, signal.SIGUSR1)


def direct(job: Job) -> bool:
    """Waits for the moment, strikes, lets everybody go. False if the moment did not come."""
    case = job.case
    deadline = time.monotonic() + CASE_S
    if case.fault != "allocation":  # which strikes in the course of the program
        moment_deadline = time.monotonic() + MOMENT_S
        while not is_reached(job):
            if time.monotonic() > moment_deadline:
                return False
            time.sleep(0.001)
        strike(job)
        while not job.board.struck_s(case.victim) and time.monotonic() < deadline:
            time.sleep(0.001)  # a signal handler of Python's, or a thread: nobody else moves before
        for rank in range(case.size):
            job.open_gate(rank)
        job.order(case.other, b"o")
    if case.fault == "stop":
        survivors = {rank for rank in range(case.size) if rank != case.victim}
        job.collect(lambda: not survivors & set(job.alive()), deadline)
        if case.victim in job.alive():
            job.order(case.victim, b"o")
            os.kill(job.pids[case.victim], signal.SIGCONT)
    job.collect(lambda: not job.alive(), deadline)
    return True


def leftovers(job: Job, before: set[str]) -> list[str]:
    """Of a job that has ended: processes, listening ports, names in /dev/shm. Processes are ended."""
    found = []
    give_up_at = time.monotonic() + LEFTOVERS_S
    while True:
        try:
            reaped, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if reaped == 0 and time.monotonic() > give_up_at:
            for pid in kernel_view.children_of(os.getpid()):
                found.append(f"process {pid}")
                os.kill(pid, signal.SIGKILL)
            give_up_at = float("inf")
        if reaped == 0:
            time.sleep(0.002)
    found += [f"port {port}" for port in (job.port, job.port + 1) if kernel_view.is_listening(port)]
    marks = ["pyallreduce", *map(str, job.pids)]
    names = set(os.listdir("/dev/shm")) - before
    return found + [f"/dev/shm/{name}" for name in names if any(mark in name for mark in marks)]


def facts_of(job: Job, start_s: float) -> Facts:
    shared_before = set(os.listdir("/dev/shm"))
    came = direct(job)
    late = job.alive()
    texts = job.end()
    return {
        "is_reached": came,
        "late": late,
        "struck_s": job.board.struck_s(job.case.victim),
        "exit_codes": job.exit_codes,
        "ended_s": job.ended_s,
        "records": [json.loads(text) if text else None for text in job.records],
        "stderr": texts,
        "left": leftovers(job, shared_before),
        "wall_s": time.monotonic() - start_s,
    }


def preload() -> None:
    sys.modules["triton"] = None  # type: ignore[assignment]  # unused, and its end is loud in a child
    import torch
    import torch._dynamo  # imported by the first optimizer of a process, two seconds
    import torch.utils.data._utils.worker as worker

    from . import rank  # noqa: F401

    torch.set_num_threads(1)
    # Their own 5 s would make every case as long.
    worker.MP_STATUS_CHECK_INTERVAL = WORKERS_LOOK_S
    gc.collect()
    gc.freeze()  # else each rank's collections walk, and copy, all that has been imported here


def main(port: int) -> None:
    preload()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for line in sys.stdin:
        start_s = time.monotonic()
        job = Job(Case(**json.loads(line)), port)
        rank = job.fork()
        if rank is not None:
            job.become(rank)
            return  # and through the end of the interpreter, like any program
        print(json.dumps(facts_of(job, start_s)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
