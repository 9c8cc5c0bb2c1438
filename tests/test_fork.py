"""fork(): a child neither hides its parent's death, nor disturbs the parent's communicator, nor hangs."""

from __future__ import annotations

import ctypes
import errno
import gc
import multiprocessing as mp
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

import pyallreduce as par
from ranks import free_port_pair, outcomes_of, run_ranks

FINE = 42


def exit_code(pid: int, deadline_s: float = 15.0) -> int:
    """Of our child, which is ended if it takes longer."""
    give_up_at = time.monotonic() + deadline_s
    while time.monotonic() < give_up_at:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"the forked child had not ended after {deadline_s} s")


def fork(body: Callable[[], Any]) -> int:
    """The pid of a child that runs ``body`` and ends as a process without Python's clean-up."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = FINE
        finally:
            os._exit(code)
    return pid


def by_file(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def init_by_file(path: str, rank: int, n: int, name: str = "", **options: Any) -> par.Communicator:
    """Without a socket of torch's, so that the descriptors are the core's alone."""
    store = dist.PrefixStore(name, dist.FileStore(path))
    return par.init(store=store, rank=rank, size=n, **options)


def attach(comm: par.Communicator) -> tuple[torch.nn.Module, par.GradientAggregator]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    return model, par.GradientAggregator(model, comm)


# --- how children end ------------------------------------------------------------------------------------------------


def end_the_interpreter(code: int) -> None:
    """As a script ends: threading's and atexit's handlers, destructors of all that is left, exit handlers of C."""
    ctypes.pythonapi.Py_Exit(ctypes.c_int(code))


class Oops(Exception):
    pass


def fail(inherited: dict[str, Any]) -> None:
    raise Oops


def collect(inherited: dict[str, Any]) -> None:
    inherited.clear()
    gc.collect()


def use(inherited: dict[str, Any]) -> None:
    comm, work, t = inherited["comm"], inherited["work"], torch.ones(3)
    calls: list[Callable[[], Any]] = [
        lambda: comm.all_reduce(t),
        lambda: comm.all_reduce(t, async_op=True),
        comm.barrier,
        lambda: comm.symmetric_empty(4),
        lambda: inherited["model"](torch.ones(1, 4)).sum().backward(),
        inherited["aggregator"].synchronize,
    ]
    if work is not None:
        calls += [work.wait, work.done]
    for call in calls:
        with pytest.raises(par.UsageError, match="parent process"):
            call()
    inherited["model"].eval()
    with torch.no_grad():
        inherited["model"](torch.ones(1, 4))  # reading is fine


def close(inherited: dict[str, Any]) -> None:
    inherited["aggregator"].close()
    inherited["comm"].close()


ENDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "os._exit": lambda inherited: None,
    "sys.exit": lambda inherited: end_the_interpreter(FINE),
    "exception": fail,
    "garbage collection": collect,
    "refused calls": use,
    "close": close,
    "close and sys.exit": lambda inherited: (close(inherited), end_the_interpreter(FINE)),
}


def children_come_and_go(rank: int, n: int, path: str) -> None:
    comm = init_by_file(path, rank, n, "under test")
    gate = init_by_file(path, rank, n, "gate")
    model, aggregator = attach(comm)
    comm.all_reduce(torch.ones(1), async_op=True).wait()  # the worker thread exists
    for pending in (False, True):
        for name, end in ENDS.items():
            model(torch.ones(1, 4)).sum().backward()
            gradient = model[0].weight.grad.clone()
            t, work = torch.ones(1000), None
            if rank == 0 and pending:
                work = comm.all_reduce(t, async_op=True)
                time.sleep(0.03)  # the worker waits for rank 1 in it
            if rank == 0:
                inherited = {
                    "comm": comm,
                    "gate": gate,
                    "model": model,
                    "aggregator": aggregator,
                    "work": work,
                }

                pid = os.fork()
                if pid == 0:
                    del comm, gate, model, aggregator, work  # only `inherited` holds them still
                    code = 1
                    try:
                        end(inherited)
                        code = FINE
                    except Oops:
                        code = FINE
                    finally:
                        os._exit(code)
                assert exit_code(pid) == FINE, (name, pending)
            gate.barrier()
            if work is None:
                comm.all_reduce(t)
            else:
                work.wait()
            assert (t == n).all(), (name, pending)
            assert torch.equal(model[0].weight.grad, gradient), (name, pending)
    comm.barrier()
    aggregator.close()
    comm.close()
    gate.close()


def test_whatever_a_child_does_the_parent_goes_on(tmp_path: Path) -> None:
    run_ranks(2, children_come_and_go, by_file(tmp_path))


def fork_while_threads_communicate(rank: int, n: int) -> None:
    comm = par.init()
    begun, over = threading.Event(), threading.Event()
    counts = torch.zeros(2)
    tensors, few = [torch.ones(50_000) for _ in range(4)], torch.ones(3)

    def communicate_once() -> None:
        for work in [comm.all_reduce(t, async_op=True) for t in tensors]:
            work.wait()
        counts[0], counts[1] = counts[0] + 1, float(over.is_set())
        comm.all_reduce(counts, "min")

    def communicate() -> None:
        while counts[1] == 0:  # until all ranks have said that they are done
            communicate_once()
            begun.set()

    # torch and glibc take locks at the first use of an operator (static objects, their exit handlers), and a fork in
    # such a moment leaves its child without that operator, or unable to exit: theirs to mend, and not tested here.
    # So both threads have used each operator before the first fork.
    communicate_once()
    thread = threading.Thread(target=communicate)
    thread.start()
    assert begun.wait(60)

    def child(i: int) -> None:
        for async_op in (False, True):
            with pytest.raises(par.UsageError, match="parent process"):
                comm.all_reduce(few, async_op=async_op)
        if i % 4 == 0:
            end_the_interpreter(FINE)

    try:
        for i in range(8):
            assert exit_code(fork(lambda i=i: child(i))) == FINE, i
    finally:
        over.set()
        thread.join()
    assert counts[0] > 0
    comm.close()


def test_forks_in_the_middle_of_collectives_leave_no_lock_held() -> None:
    # A fork beside busy threads takes 1 s even on a machine with nothing else to do.
    run_ranks(2, fork_while_threads_communicate, deadline_s=110)


# --- descriptors -----------------------------------------------------------------------------------------------------


def descriptors() -> set[tuple[int, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return found


def compare_descriptors(rank: int, n: int, path: str) -> None:
    before = descriptors()
    comm = init_by_file(path, rank, n)
    assert {d for d in descriptors() - before if "socket" in d[1]}  # there is something to close
    tensor = comm.symmetric_empty(1000).fill_(1.0)
    mine = descriptors()

    def child() -> None:
        assert descriptors() <= before, descriptors() - before
        assert tensor.sum() == 1000
        # Numbers are free again, and stay this child's when it drops what it has inherited.
        reader, writer = os.pipe()
        held.clear()
        gc.collect()
        os.write(writer, b"x")
        assert os.read(reader, 1) == b"x"

    held = [comm]
    assert exit_code(fork(child)) == FINE
    assert descriptors() == mine
    comm.all_reduce(tensor)
    assert tensor.sum() == 1000 * n
    comm.close()


def test_children_have_none_of_the_cores_descriptors(tmp_path: Path) -> None:
    run_ranks(3, compare_descriptors, by_file(tmp_path))


def refuse_pidfd() -> None:
    """A seccomp filter for this thread and its children: pidfd_open does not exist."""
    pidfd_open, allow, errno_is = 434, 0x7FFF0000, 0x00050000
    load_number, jump_if_equal, answer = 0x20, 0x15, 0x06
    program = (
        struct.pack("HBBI", load_number, 0, 0, 0)
        + struct.pack("HBBI", jump_if_equal, 0, 1, pidfd_open)
        + struct.pack("HBBI", answer, 0, 0, errno_is | errno.ENOSYS)
        + struct.pack("HBBI", answer, 0, 0, allow)
    )
    instructions = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    )
    libc = ctypes.CDLL(None, use_errno=True)
    set_no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    for arguments in (
        (set_no_new_privileges, 1, 0, 0, 0),
        (set_seccomp, filter_mode, header, 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
    with pytest.raises(OSError):
        os.pidfd_open(os.getpid())


def die_with_loader(
    rank: int, n: int, path: str, has_pidfd: bool, victim: int
) -> tuple[float, int]:
    if not has_pidfd:
        refuse_pidfd()
    comm = par.init()
    loader = DataLoader(
        TensorDataset(torch.arange(1000)),
        num_workers=2,
        multiprocessing_context="fork",
        prefetch_factor=2,
    )
    batches: Iterator[Any] = iter(loader)
    next(batches)
    t = torch.ones(1000)
    comm.all_reduce(t)
    if rank == victim:
        pids = [worker.pid for worker in batches._workers]
        Path(path).write_text(" ".join(map(str, pids)) + f" {time.monotonic()}")
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(par.PeerError) as raised:  # the victim has not come to this call
        comm.all_reduce(t)
    learned_s = time.monotonic()
    assert raised.value.peers == (victim,)
    if rank == 2:
        died_s, alive = end_orphans(path)
        return learned_s - died_s, alive
    return learned_s - float(Path(path).read_text().split()[-1]), 2


def end_orphans(path: str) -> tuple[float, int]:
    """When their parent died, and how many were alive still."""
    *pids, died_s = Path(path).read_text().split()
    alive = 0
    for pid in map(int, pids):
        try:
            os.kill(pid, signal.SIGKILL)
            alive += 1
        except ProcessLookupError:
            pass
    return float(died_s), alive


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("has_pidfd", [True, False], ids=["pidfd", "end-of-file"])
def test_orphaned_loader_workers_hide_no_death(
    tmp_path: Path, has_pidfd: bool, victim: int
) -> None:
    outcomes = outcomes_of(3, die_with_loader, str(tmp_path / "orphans"), has_pidfd, victim)
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            assert outcome.exitcode == -signal.SIGKILL
        else:
            assert outcome.error is None, outcome.trace
            detection_s, alive = outcome.value
            assert detection_s < 1.0
            assert alive == 2, "the workers had ended with their parent: this shows nothing"


def die_with_orphan(rank: int, n: int, path: str) -> None:
    comm = par.init()
    comm.barrier()
    if rank == 0:
        pid = fork(lambda: time.sleep(20))
        Path(path).write_text(f"{pid} {time.monotonic()}")
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(par.PeerError):
        comm.barrier()
    port = int(os.environ["PYALLREDUCE_PORT"])
    with socket.create_server(("127.0.0.1", port)):  # the next run can start
        pass
    assert end_orphans(path)[1] == 1


def test_orphans_keep_no_port_of_the_rendezvous(tmp_path: Path) -> None:
    env = {"PYALLREDUCE_PORT": str(free_port_pair())}
    outcomes = outcomes_of(2, die_with_orphan, str(tmp_path / "orphan"), env=env)
    assert outcomes[1].error is None, outcomes[1].trace


# --- multiprocessing -------------------------------------------------------------------------------------------------


def own_ranks(rank: int, n: int, path: str, inherited: par.Communicator, words: str) -> None:
    with pytest.raises(par.UsageError, match=words):
        inherited.barrier()
    inherited.close()
    comm = init_by_file(path, rank, n, "children")
    work = comm.all_reduce(t := torch.ones(5), async_op=True)
    assert work is not None
    work.wait()
    assert (t == n).all()
    comm.close()


def parent_of_ranks(rank: int, n: int, path: str, method: str) -> None:
    comm = init_by_file(path, rank, n, "parents")
    pending = comm.all_reduce(torch.ones(5), async_op=True) if rank == 0 else None
    if rank == 0:
        mp.current_process()._config["daemon"] = False  # or it may have no children
        context: Any = mp.get_context(method)
        context.set_forkserver_preload(["torch"])  # not all that the tests' own server has
        words = "parent process" if method == "fork" else "pickle"
        children = [
            context.Process(target=own_ranks, args=(r, 2, path, comm, words)) for r in range(2)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(40)
            assert child.exitcode == 0
    Path(path + " children done").touch() if rank == 0 else None
    while not Path(path + " children done").exists():
        time.sleep(0.02)
    if pending is not None:
        pending.wait()
    else:
        comm.all_reduce(torch.ones(5))
    comm.barrier()
    comm.close()


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_children_can_be_ranks_of_their_own(tmp_path: Path, method: str) -> None:
    run_ranks(2, parent_of_ranks, by_file(tmp_path), method)
