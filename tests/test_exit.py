"""A rank that leaves, by the end of its program, by Ctrl-C or by an exception, is gone in two seconds, says nothing
but what the user expects, and its peers learn who it was."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pyallreduce as par
from pyallreduce import rendezvous
from ranks import Outcome, outcomes_of, queued_s, run_ranks

LIMIT_S = 2.0
# What interpreter and torch need for their own end, beside what they wait for a core.
ROOM_S = 3.0
INTERRUPTED = 130  # the exit code of a shell for a program that Ctrl-C has ended
NOISE = re.compile(
    r"Exception (in|ignored)|terminate|[Ff]atal"
)  # of threads, of the interpreter's end

Main = Callable[["Rank"], Any]


class Rank:
    """One of two. Rank 0 leaves in a way of its own while rank 1 is elsewhere, until it is told."""

    def __init__(self, rank: int, n: int, path: str) -> None:
        self.rank, self.n, self.path = rank, n, Path(path)
        self.module: nn.Sequential  # that of the call, whose layers take hooks
        self.kept: Any  # alive until the interpreter's end

    @property
    def stays(self) -> bool:
        return self.rank == 1

    def tell(self, what: str) -> None:
        (self.path / what).touch()

    def await_(self, what: str) -> None:
        while not (self.path / what).exists():
            time.sleep(0.01)

    def await_end_of_rank_0(self) -> None:
        self.await_("left")
        state = Path(f"/proc/{(self.path / 'pid').read_text()}/stat")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # reaped
            while state.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.01)

    def leaves_now(self) -> None:
        (self.path / f"{time.monotonic()}.leaves").write_text(str(queued_s()))

    def signal_soon(self, *signals: int) -> None:
        """As from a terminal, while this thread waits for rank 1; one after the other."""

        def send() -> None:
            for number in signals:
                time.sleep(0.4)
                self.leaves_now()
                os.kill(os.getpid(), number)

        threading.Thread(target=send, daemon=True).start()


def as_program(rank: int, n: int, path: str, main: Main) -> Any:
    """Runs ``main`` as the interpreter runs a script, to the interpreter's very end. The rank that stays returns."""
    me = Rank(rank, n, path)
    if me.stays:
        return main(me)
    (me.path / "pid").write_text(str(os.getpid()))
    os.dup2(os.open(f"{path}/stderr", os.O_WRONLY | os.O_CREAT), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code: Any = 0
    try:
        main(me)
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        traceback.print_exc()
        code = INTERRUPTED
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    me.leaves_now()
    me.tell("left")
    ctypes.pythonapi.Py_Exit(ctypes.c_int(code))
    return None


def leave(path: Path, main: Main, code: int, env: dict[str, str] | None = None) -> str:
    """Runs both ranks; what rank 0 has written to stderr. It must end with this code, in time."""
    outcomes: list[Outcome] = outcomes_of(2, as_program, str(path), main, env=env, deadline_s=40)
    said = (path / "stderr").read_text()
    assert outcomes[0].exitcode == code, said
    assert outcomes[1].error is None, outcomes[1].trace
    first = min(path.glob("*.leaves"), key=lambda leaves: float(leaves.stem))
    took_s = outcomes[0].ended_s - float(first.stem)
    queued_for_s = outcomes[0].queued_s - float(first.read_text())
    assert took_s - queued_for_s < LIMIT_S + ROOM_S, f"{took_s} s, of which {queued_for_s} s queued"
    return said


def lose_rank_0(me: Rank, call: Callable[[], Any]) -> None:
    me.await_("left")

    def call_again() -> None:  # what rank 0 has started before may still be finished
        for _ in range(3):
            call()

    with pytest.raises(par.PeerError) as raised:
        call_again()
    assert raised.value.peers == (0,)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def loss_of(model: nn.Module, rank: int = 0) -> torch.Tensor:
    return model(torch.full((2, 64), 1.0 + rank)).square().sum()


# --- what rank 0 is in the middle of: set up on both ranks; the call returned needs both ------------------------------


def communicator(me: Rank) -> Callable[[], Any]:
    comm = par.init()
    comm.barrier()
    return lambda: comm.all_reduce(torch.ones(1000))


def behind_others(me: Rank) -> Callable[[], Any]:
    comm = par.init()
    comm.barrier()

    def call() -> None:
        works = [comm.all_reduce(torch.ones(1000), async_op=True) for _ in range(3)]
        comm.all_reduce(torch.ones(1_000_000))
        del works

    return call


def work(me: Rank) -> Callable[[], Any]:
    comm = par.init()
    comm.barrier()

    def call() -> None:
        pending = comm.all_reduce(torch.ones(1000), async_op=True)
        assert pending is not None
        pending.wait()

    return call


def aggregator(me: Rank, **options: Any) -> Callable[[], Any]:
    comm = par.init()
    model = Net()
    optimizer = par.SGD(model.parameters(), lr=0.001)
    agg = par.GradientAggregator(model, comm, bucket_bytes=1, optimizer=optimizer, **options)

    def iterate() -> None:
        loss_of(model).backward()
        optimizer.step()

    iterate()
    me.module, me.kept = model.body, agg
    return iterate


def eager(me: Rank) -> Callable[[], Any]:
    return aggregator(me, update="eager")


def ddp(me: Rank) -> Callable[[], Any]:
    dist.init_process_group("gloo")
    comm = par.init()
    module = DistributedDataParallel(Net(), bucket_cap_mb=0.001)
    module.register_comm_hook(comm, par.allreduce_hook)
    for _ in range(2):
        loss_of(module).backward()
    me.module, me.kept = module.module.body, comm
    return lambda: loss_of(module).backward()


BACKWARDS = [aggregator, eager, ddp]
CALLS = [communicator, behind_others, work, *BACKWARDS]


# --- the end of the program ------------------------------------------------------------------------------------------


def ends_with_pending_work(me: Rank) -> None:
    comm = par.init()
    comm.barrier()
    if me.stays:
        return lose_rank_0(me, lambda: comm.all_reduce(torch.ones(1000)))
    me.kept = [comm.all_reduce(torch.ones(1000), async_op=True) for _ in range(3)]
    time.sleep(0.1)  # the worker waits in the first
    return None


def ends_beside_a_daemon(me: Rank) -> None:
    """A thread of the user's waits in the core, and nobody joins it."""
    comm = par.init()
    comm.barrier()
    if me.stays:
        me.await_end_of_rank_0()  # its threads' calls are under way until then
        return lose_rank_0(me, lambda: comm.all_reduce(torch.ones(3)))
    pending = comm.all_reduce(torch.ones(3), async_op=True)
    assert pending is not None

    def wait_quietly(call: Callable[[], Any]) -> None:
        with contextlib.suppress(par.Error):
            call()

    for call in (pending.wait, lambda: comm.all_reduce(torch.ones(3))):
        threading.Thread(target=wait_quietly, args=(call,), daemon=True).start()
    time.sleep(0.1)
    return None


class InBackward:
    """sys.exit() from a hook, when the buckets of later layers are on their way."""

    def __init__(self, build: Callable[[Rank], Callable[[], Any]]) -> None:
        self.build = build

    def __call__(self, me: Rank) -> None:
        call = self.build(me)
        if me.stays:
            return lose_rank_0(me, call)
        me.module[1].weight.register_hook(lambda grad: sys.exit(3))
        return call()


@pytest.mark.parametrize(
    ("main", "code"),
    [
        pytest.param(ends_with_pending_work, 0, id="pending work"),
        pytest.param(ends_beside_a_daemon, 0, id="daemon threads"),
        *(
            pytest.param(InBackward(build), 3, id=f"sys.exit, {build.__name__}")
            for build in BACKWARDS
        ),
    ],
)
def test_the_end_of_a_program_is_quiet(tmp_path: Path, main: Main, code: int) -> None:
    assert leave(tmp_path, main, code) == ""


# --- signals ---------------------------------------------------------------------------------------------------------


class Interrupted:
    """Rank 0 waits for rank 1 in the call when the signals come."""

    def __init__(self, build: Callable[[Rank], Callable[[], Any]], *signals: int) -> None:
        self.build, self.signals = build, signals

    def __call__(self, me: Rank) -> None:
        call = self.build(me)
        if me.stays:
            return lose_rank_0(me, call)
        me.signal_soon(*self.signals)
        return call()


def check_ctrl_c(said: str) -> None:
    """One traceback, the user's own, and no word of a thread or of the interpreter's end."""
    assert said.rstrip().endswith("KeyboardInterrupt"), said
    assert said.count("Traceback") == 1, said
    assert not NOISE.search(said), said


@pytest.mark.parametrize("build", CALLS, ids=lambda build: build.__name__)
def test_ctrl_c(tmp_path: Path, build: Callable[[Rank], Callable[[], Any]]) -> None:
    check_ctrl_c(leave(tmp_path, Interrupted(build, signal.SIGINT), INTERRUPTED))


def work_twice(me: Rank) -> Callable[[], Any]:
    call = work(me)

    def stubborn() -> None:
        try:
            call()
        finally:
            call()  # the clean-up waits, too

    return call if me.stays else stubborn


def test_ctrl_c_twice(tmp_path: Path) -> None:
    twice = Interrupted(work_twice, signal.SIGINT, signal.SIGINT)
    said = leave(tmp_path, twice, INTERRUPTED)
    assert said.count("KeyboardInterrupt") == 2, said
    assert not NOISE.search(said), said


def with_handler(me: Rank) -> Callable[[], Any]:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
    return communicator(me)


def test_sigterm_with_a_handler_that_raises(tmp_path: Path) -> None:
    assert leave(tmp_path, Interrupted(with_handler, signal.SIGTERM), 7) == ""


def init_without_the_other(me: Rank) -> Callable[[], Any]:
    return par.init


def init_without_rank_0(me: Rank) -> Callable[[], Any]:
    os.environ["RANK"] = "1"  # there is no rank 0, and nobody listens
    return par.init


def init_with_a_rank_that_stops(me: Rank, others_rank: int = 1) -> Callable[[], Any]:
    """Rank 1 has come to the rendezvous, and comes no further."""
    store = dist.FileStore(str(me.path / "store"))
    if me.stays:
        rendezvous.meet(store, others_rank, 2, 20)
    return lambda: par.init(store=store, rank=1 - others_rank, size=2)


def init_with_a_leader_that_stops(me: Rank) -> Callable[[], Any]:
    return init_with_a_rank_that_stops(me, others_rank=0)


class InterruptedInit(Interrupted):
    def __call__(self, me: Rank) -> None:
        call = self.build(me)
        if not me.stays:
            me.signal_soon(*self.signals)
            call()


@pytest.mark.parametrize(
    "build",
    [
        init_without_the_other,
        init_without_rank_0,
        init_with_a_rank_that_stops,
        init_with_a_leader_that_stops,
    ],
    ids=lambda build: build.__name__,
)
def test_ctrl_c_in(tmp_path: Path, build: Callable[[Rank], Callable[[], Any]]) -> None:
    check_ctrl_c(leave(tmp_path, InterruptedInit(build, signal.SIGINT), INTERRUPTED))


# --- exceptions ------------------------------------------------------------------------------------------------------


class Oops(Exception):
    pass


def fail(*_: Any) -> None:
    raise Oops


def raise_in(where: str, layer: nn.Module) -> Any:
    """A handle, to remove it again."""
    if where == "forward":
        return layer.register_forward_hook(fail)
    return layer.weight.register_hook(fail)


class Raises:
    """An exception of the user's in the forward or backward of rank 0, which ends its program."""

    def __init__(self, build: Callable[[Rank], Callable[[], Any]], where: str) -> None:
        self.build, self.where = build, where

    def __call__(self, me: Rank) -> None:
        call = self.build(me)
        if me.stays:
            return lose_rank_0(me, call)
        raise_in(self.where, me.module[1])
        return call()


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("build", BACKWARDS, ids=lambda build: build.__name__)
def test_an_exception_that_ends_one_rank(
    tmp_path: Path, build: Callable[[Rank], Callable[[], Any]], where: str
) -> None:
    said = leave(tmp_path, Raises(build, where), 1)
    assert said.rstrip().endswith("Oops"), said
    assert said.count("Traceback") == 1, said
    assert not NOISE.search(said), said


def survive_exceptions(rank: int, n: int, path: str, where: str) -> None:
    me = Rank(rank, n, path)
    backward = ddp(me)
    handle = raise_in(where, me.module[1])
    with pytest.raises(Oops):
        backward()
    handle.remove()
    comm = me.kept
    t = torch.ones(3)
    comm.all_reduce(t)
    assert (t == n).all()
    if where == "forward":  # DDP itself is lost after a backward that has raised
        backward()
        gradient = me.module[1].weight.grad.clone()
        comm.all_reduce(gradient, "avg")
        assert torch.equal(gradient, me.module[1].weight.grad)
    comm.close()
    dist.destroy_process_group()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_communicator_of_a_ddp_hook_survives_exceptions(tmp_path: Path, where: str) -> None:
    run_ranks(2, survive_exceptions, str(tmp_path), where)
