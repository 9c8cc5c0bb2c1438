"""Bad input is refused before anything is sent; disagreement, death and silence end with the right error everywhere."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pyallreduce as par
from ranks import outcomes_of, run_ranks

BAD_CALLS: list[tuple[str, Callable[[par.Communicator], Any], list[str]]] = [
    ("not a tensor", lambda c: c.all_reduce([1.0]), ["list", "torch.Tensor"]),
    ("device", lambda c: c.all_reduce(torch.empty(3, device="meta")), ["meta", "CPU"]),
    (
        "dtype",
        lambda c: c.all_reduce(torch.zeros(3, dtype=torch.complex64)),
        ["complex64", "float32"],
    ),
    ("bool", lambda c: c.broadcast(torch.zeros(3, dtype=torch.bool)), ["bool", "uint8"]),
    ("sparse", lambda c: c.all_reduce(torch.eye(3).to_sparse()), ["sparse", "to_dense"]),
    ("op", lambda c: c.all_reduce(torch.zeros(3), "mean"), ["'mean'", "sum, avg, prod, min, max"]),
    ("op type", lambda c: c.all_reduce(torch.zeros(3), 3), ["3", "sum"]),
    ("avg of ints", lambda c: c.all_reduce(torch.zeros(3, dtype=torch.int32), "avg"), ["int32"]),
    ("expanded", lambda c: c.all_reduce(torch.zeros(1).expand(4)), ["overlaps", "contiguous"]),
    ("gaps", lambda c: c.all_reduce(torch.zeros(8)[::2]), ["gaps", "contiguous"]),
    ("root", lambda c: c.broadcast(torch.zeros(3), root=c.size), ["root", "0 to"]),
    ("root type", lambda c: c.broadcast(torch.zeros(3), root="0"), ["root"]),
    (
        "scatter numel",
        lambda c: c.reduce_scatter(torch.zeros(3), torch.zeros(4)),
        ["4 elements", "size x output"],
    ),
    (
        "gather numel",
        lambda c: c.all_gather(torch.zeros(5), torch.zeros(4)),
        ["5 elements", "size x input"],
    ),
    (
        "gather dtypes",
        lambda c: c.all_gather(torch.zeros(4 * c.size), torch.zeros(4).double()),
        ["float32", "float64"],
    ),
    ("overlap", lambda c: c.all_gather((t := torch.zeros(4 * c.size)), t[:4]), ["overlap"]),
    (
        "not contiguous",
        lambda c: c.all_gather(torch.zeros(2, 2 * c.size).t(), torch.zeros(4)),
        ["contiguous"],
    ),
    ("numel", lambda c: c.symmetric_empty(-1), ["-1"]),
    ("symmetric dtype", lambda c: c.symmetric_empty(4, torch.int8), ["int8", "uint8"]),
    ("second init", lambda c: par.init(), ["before", "store="]),
    ("rank without store", lambda c: par.init(rank=0, size=1), ["store"]),
    ("timeout", lambda c: par.init(timeout_s=-1), ["-1", "positive"]),
]


def make_bad_calls(rank: int, n: int) -> None:
    comm = par.init()
    for name, call, words in BAD_CALLS:
        with pytest.raises(par.UsageError) as raised:
            call(comm)
        for word in words:
            assert word in str(raised.value), (name, word, str(raised.value))
        assert raised.value.peer is None
        assert raised.value.peers == ()
    t = torch.ones(5)
    comm.all_reduce(t)  # still usable
    assert (t == n).all()
    comm.close()
    comm.close()
    with pytest.raises(par.UsageError, match="closed"):
        comm.all_reduce(t)
    again = par.init()  # the first is closed
    again.all_reduce(t)
    assert (t == n * n).all()
    unpickled = pickle.loads(pickle.dumps(again))
    with pytest.raises(par.UsageError, match="pickle"):
        unpickled.barrier()
    again.close()


@pytest.mark.parametrize("n", [1, 2])
def test_bad_input_is_refused_and_harmless(n: int) -> None:
    run_ranks(n, make_bad_calls)


def test_the_error_family() -> None:
    for kind in (par.PeerError, par.TimeoutError, par.MismatchError, par.UsageError):
        assert issubclass(kind, par.Error)
    assert issubclass(par.TimeoutError, TimeoutError)
    error = par.PeerError("rank 3 died", [3, 1])
    assert (error.peers, error.peer) == ((1, 3), 1)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.peers) == (par.PeerError, "rank 3 died", (1, 3))


# --- disagreement ----------------------------------------------------------------------------------------------------

ODD_CALLS: dict[
    str, tuple[Callable[[par.Communicator], Any], Callable[[par.Communicator], Any]]
] = {
    "dtype": (lambda c: c.all_reduce(torch.ones(10)), lambda c: c.all_reduce(torch.ones(10).int())),
    "op": (lambda c: c.all_reduce(torch.ones(10)), lambda c: c.all_reduce(torch.ones(10), "max")),
    "count": (lambda c: c.all_reduce(torch.ones(10)), lambda c: c.all_reduce(torch.ones(11))),
    "large count": (
        lambda c: c.all_reduce(torch.ones(10**6)),
        lambda c: c.all_reduce(torch.ones(3)),
    ),
    "kind": (lambda c: c.all_reduce(torch.ones(10)), lambda c: c.broadcast(torch.ones(10))),
    "barrier": (lambda c: c.barrier(), lambda c: c.all_reduce(torch.ones(1))),
    "root": (lambda c: c.broadcast(torch.ones(10), 0), lambda c: c.broadcast(torch.ones(10), 1)),
    "memory format": (
        lambda c: c.all_reduce(torch.ones(2, 3, 4, 5)),
        lambda c: c.all_reduce(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)),
    ),
    "symmetric numel": (lambda c: c.symmetric_empty(64), lambda c: c.symmetric_empty(65)),
    "symmetric dtype": (
        lambda c: c.symmetric_empty(64),
        lambda c: c.symmetric_empty(64, torch.float64),
    ),
    "async": (
        lambda c: c.all_reduce(torch.ones(10), async_op=True).wait(),
        lambda c: c.all_reduce(torch.ones(12), async_op=True).wait(),
    ),
}


def disagree(rank: int, n: int, odd: int) -> None:
    comm = par.init()
    for name, (usual, different) in ODD_CALLS.items():
        comm.barrier()
        with pytest.raises(par.MismatchError) as raised:
            (different if rank == odd else usual)(comm)
        wrong = (1,) if n == 2 else (odd,)  # a tie: rank 0 is right
        assert raised.value.peers == wrong, (name, str(raised.value))
        for again in range(2):  # poisoned: the first cause, at once
            with pytest.raises(par.MismatchError) as repeated:
                comm.all_reduce(torch.ones(again + 1))
            assert str(repeated.value) == str(raised.value)
        comm.close()
        comm = par.init()
    comm.close()


@pytest.mark.parametrize(("n", "odd"), [(2, 0), (2, 1), (3, 0), (5, 3)])
def test_mismatched_calls_raise_on_every_rank(n: int, odd: int) -> None:
    run_ranks(n, disagree, odd)


# --- death and silence -----------------------------------------------------------------------------------------------


def impatient_init(timeout_s: float) -> par.Communicator:
    """The short deadline is for the calls under test, not for the start of the processes."""
    par.init().close()
    return par.init(timeout_s=timeout_s)


def die_or_wait(rank: int, n: int, how: str, large: bool) -> None:
    comm = impatient_init(3.0)
    t = torch.ones(3_000_000 if large else 10)
    for i in range(1000):
        if rank == n - 1 and i == 5:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "exit":
                os._exit(0)
            if how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if how == "close":
                comm.close()
                return
        try:
            comm.all_reduce(t)
        except par.Error as error:
            first = error
            break
    with pytest.raises(type(first)) as again:
        comm.barrier()
    assert str(again.value) == str(first)
    raise first


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("how", ["kill", "exit", "close"])
@pytest.mark.parametrize("n", [2, 4])
def test_a_rank_that_ends_is_named_on_every_survivor(n: int, how: str, large: bool) -> None:
    outcomes = outcomes_of(n, die_or_wait, how, large)
    for outcome in outcomes[:-1]:
        assert isinstance(outcome.error, par.PeerError), outcome
        assert outcome.error.peers == (n - 1,)


def test_a_stopped_rank_is_silence_not_death() -> None:
    # `started`: the stopped rank never ends by itself, and that is no failure of the test.
    outcomes = outcomes_of(3, die_or_wait, "stop", False, deadline_s=12, started=lambda pids: None)
    for outcome in outcomes[:-1]:
        assert isinstance(outcome.error, par.TimeoutError), outcome
        assert isinstance(outcome.error, TimeoutError)
        assert outcome.error.peers == (2,)


def come_late(rank: int, n: int) -> None:
    comm = impatient_init(1.0)
    if rank == 1:
        time.sleep(2.5)
    with pytest.raises(par.TimeoutError) as raised:
        comm.all_reduce(torch.ones(3))
    assert raised.value.peers == (1,)  # also on the late rank itself: the others have told it
    assert rank != 1 or "reported by" in str(raised.value)


def test_a_late_rank_learns_why_nobody_waits_for_it() -> None:
    run_ranks(3, come_late)


def leave_early(rank: int, n: int) -> None:
    comm = par.init()
    t = torch.ones(100_000)
    comm.all_reduce(t)
    if rank == 0:
        time.sleep(0.3)  # the other has closed and ended by now: no error, it had done its part
    comm.close()


def test_an_orderly_close_is_no_error() -> None:
    run_ranks(2, leave_early)


def close_in_the_middle(rank: int, n: int) -> float:
    comm = par.init()
    if rank == 0:
        work = comm.all_reduce(torch.ones(10), async_op=True)  # rank 1 never comes
        time.sleep(0.1)
        start = time.monotonic()
        comm.close()
        took = time.monotonic() - start
        with pytest.raises(par.Error):
            work.wait()
        return took
    time.sleep(0.5)
    comm.all_reduce(torch.ones(10))  # to which rank 0 had contributed
    with pytest.raises(par.PeerError, match="rank 0 closed") as raised:
        comm.barrier()
    assert raised.value.peers == (0,)
    comm.close()
    return 0.0


def test_close_does_not_wait_for_others() -> None:
    assert run_ranks(2, close_in_the_middle)[0] < 5  # its deadline would be 60


def use_in_forked_child(rank: int, n: int) -> None:
    comm = par.init()
    comm.all_reduce(torch.ones(3), async_op=True).wait()  # the worker thread exists
    pid = os.fork()
    if pid == 0:
        try:
            comm.all_reduce(torch.ones(3))
        except par.UsageError as error:
            os._exit(42 if "parent process" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    t = torch.ones(3)
    comm.all_reduce(t)
    assert (t == n).all()
    comm.close()


def test_a_forked_child_gets_a_clear_error() -> None:
    run_ranks(2, use_in_forked_child)


def interrupted(rank: int, n: int) -> None:
    comm = par.init()
    if rank == 1:
        time.sleep(1.0)
        with pytest.raises(par.Error, match="interrupted") as raised:
            comm.barrier()
        assert raised.value.peers == (0,)
        return
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        comm.barrier()
    with pytest.raises(par.Error, match="interrupted"):
        comm.barrier()


def test_ctrl_c_ends_a_wait() -> None:
    run_ranks(2, interrupted)


def no_leftovers(rank: int, n: int) -> tuple[int, int]:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    par.init().close()
    before = descriptors()
    for _ in range(20):
        comm = par.init()
        t = comm.symmetric_empty(1000)
        comm.all_reduce(t.zero_())
        comm.close()
        del comm, t
    return before, descriptors()


def test_communicators_leak_no_descriptors_and_nothing_in_dev_shm() -> None:
    before = set(os.listdir("/dev/shm"))
    for start, end in run_ranks(3, no_leftovers):
        assert end <= start
    left = {name for name in set(os.listdir("/dev/shm")) - before if "pyallreduce" in name}
    assert not left


def reserve_too_much(rank: int, n: int) -> str:
    comm = par.init()
    with pytest.raises(par.Error) as raised:
        comm.symmetric_empty(2**50, torch.uint8)
    return str(raised.value)


def test_memory_that_cannot_be_had_is_an_error_on_all_ranks() -> None:
    for message in run_ranks(2, reserve_too_much):
        assert "cannot reserve" in message
        assert "memory limit" in message
