"""Ranks that do different things: an error on all of them that names rank, call and parameter, never a wrong sum.

The communicator's plain cases are in test_errors.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import pyallreduce as par
from ranks import run_ranks

Call = Callable[[par.Communicator], Any]


@dataclass(frozen=True)
class Case:
    """What most ranks do, what the last one does, and words that the message must have on every rank."""

    name: str
    usual: Call
    odd: Call
    words: tuple[str, ...]


def run_cases(rank: int, n: int, port: int, names: list[str], expected: type[par.Error]) -> None:
    """Each error poisons its communicator, so each case has a new one."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    for case in (case for case in CASES if case.name in names):
        prefix = dist.PrefixStore(case.name, store)
        comm = par.init(store=prefix, rank=rank, size=n, timeout_s=20)
        with pytest.raises(expected) as raised:
            (case.odd if rank == n - 1 else case.usual)(comm)
        message = str(raised.value)
        # A tie, in which rank 0 counts as right, is decided against the last rank as well.
        assert raised.value.peers == (n - 1,), (case.name, message)
        for word in (*case.words, f"rank {n - 1}"):
            assert word in message, (case.name, word, message)
        with pytest.raises(expected) as again:  # the first cause, from now on
            comm.barrier()
        assert str(again.value) == message
        comm.close()


def check(n: int, cases: list[Case], expected: type[par.Error] = par.MismatchError) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    run_ranks(n, run_cases, store.port, [case.name for case in cases], expected)


# --- the communicator ------------------------------------------------------------------------------------------------


def calls(*made: Callable[[par.Communicator], Any]) -> Call:
    """Asynchronous ones are waited for at the end."""

    def make(comm: par.Communicator) -> None:
        works = [call(comm) for call in made]
        for work in works:
            if work is not None:
                work.wait()

    return make


def reduce(
    numel: int, op: str = "sum", dtype: torch.dtype = torch.float32, sync: bool = False
) -> Call:
    return lambda comm: comm.all_reduce(torch.ones(numel, dtype=dtype), op, async_op=not sync)


def symmetric(numel: int, used: int, op: str = "sum") -> Call:
    return lambda comm: comm.all_reduce(comm.symmetric_empty(numel).zero_()[:used], op)


def scatter(numel: int, op: str = "sum") -> Call:
    return lambda comm: comm.reduce_scatter(
        torch.empty(numel), torch.ones(numel * comm.size), op, async_op=True
    )


def gather(numel: int, dtype: torch.dtype = torch.float32) -> Call:
    return lambda comm: comm.all_gather(
        torch.empty(numel * comm.size, dtype=dtype), torch.ones(numel, dtype=dtype), async_op=True
    )


def broadcast(numel: int, root: int = 0) -> Call:
    return lambda comm: comm.broadcast(torch.ones(numel), root, async_op=True)


COMMUNICATOR = [
    Case("async op", calls(reduce(9)), calls(reduce(9, "max")), ("sum", "max", "as call 1")),
    Case(
        "async dtype",
        calls(reduce(9)),
        calls(reduce(9, dtype=torch.float64)),
        ("float32", "float64"),
    ),
    Case(
        "async order",
        calls(reduce(7), reduce(5), reduce(5)),
        calls(reduce(5), reduce(7), reduce(5)),
        ("7 elements", "5 elements", "as call 1"),
    ),
    Case(
        "order of kinds",
        calls(gather(6), broadcast(6)),
        calls(broadcast(6), gather(6)),
        ("all_gather", "broadcast", "as call 1"),
    ),
    Case(
        "later call",
        calls(*[reduce(8)] * 20, reduce(8, sync=True)),
        calls(*[reduce(8)] * 20, reduce(9, sync=True)),
        ("8 elements", "9 elements", "as call 21"),
    ),
    Case(
        "sync against async",
        calls(reduce(8, sync=True), reduce(3)),
        calls(reduce(8), reduce(4)),
        ("3 elements", "4 elements", "as call 2"),
    ),
    Case("scatter op", calls(scatter(5)), calls(scatter(5, "avg")), ("reduce_scatter(sum", "(avg")),
    Case("scatter count", calls(scatter(5)), calls(scatter(6)), ("reduce_scatter", "elements")),
    Case("gather count", calls(gather(5)), calls(gather(50_000)), ("all_gather", "elements")),
    Case("gather dtype", calls(gather(5)), calls(gather(5, torch.int32)), ("float32", "int32")),
    Case("broadcast count", calls(broadcast(5)), calls(broadcast(6)), ("5 elem", "6 elem")),
    Case("async root", calls(broadcast(5)), calls(broadcast(5, 1)), ("root 0", "root 1")),
    Case(
        "slice of symmetric memory",
        symmetric(10_000, 9_000),
        symmetric(10_000, 9_001),
        ("9000 elements", "9001 elements", "as call 2"),
    ),
    Case(
        "op on symmetric memory",
        symmetric(10_000, 9_000),
        symmetric(10_000, 9_000, "min"),
        ("sum", "min"),
    ),
    Case(
        "allocation against reduction",
        lambda comm: comm.symmetric_empty(64),
        reduce(64, sync=True),
        ("symmetric_empty", "all_reduce"),
    ),
]


@pytest.mark.parametrize("n", [2, 3])
def test_calls_that_differ(n: int) -> None:
    check(n, COMMUNICATOR)


def fewer_calls(rank: int, n: int, async_op: bool) -> None:
    comm = par.init()
    calls(*[reduce(100, sync=not async_op)] * 4)(comm)
    if rank < n - 1:
        with pytest.raises(par.PeerError, match=rf"rank {n - 1} closed .* as call 5") as raised:
            calls(reduce(100, sync=not async_op))(comm)
        assert raised.value.peers == (n - 1,)
    comm.close()


def more_calls(rank: int, n: int, async_op: bool) -> None:
    comm = par.init()
    calls(*[reduce(100, sync=not async_op)] * 4)(comm)
    if rank == n - 1:
        with pytest.raises(par.PeerError) as raised:
            calls(reduce(100, sync=not async_op))(comm)
        assert set(raised.value.peers) <= set(range(n - 1))
        assert "as call 5" in str(raised.value)
    comm.close()


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("program", [fewer_calls, more_calls])
def test_a_call_more_or_less_at_the_end(program: Callable[..., None], async_op: bool) -> None:
    run_ranks(3, program, async_op)


# --- the aggregator --------------------------------------------------------------------------------------------------


def net(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"wide": 4, "bias": True, "dtype": torch.float32, **changes}
    wide, dtype = options["wide"], options["dtype"]
    return nn.Sequential(
        nn.Linear(3, wide, bias=options["bias"], dtype=dtype), nn.Linear(wide, 2, dtype=dtype)
    )


class Pair(nn.Module):
    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.add_module(first, nn.Linear(3, 3))
        self.add_module(second, nn.Linear(3, 3))


def frozen() -> nn.Module:
    model = net()
    model[1].bias.requires_grad_(False)
    return model


def with_buffer() -> nn.Module:
    model = net()
    model[1].register_buffer("scale", torch.ones(2))
    return model


def transposed() -> nn.Module:
    model = net()
    model[0].weight.data = model[0].weight.data.t().contiguous().t()
    return model


def attach(build: Callable[[], nn.Module] = net, eager: bool = False, **options: Any) -> Call:
    def make(comm: par.Communicator) -> None:
        model = build()
        parameters = [p for p in model.parameters() if p.requires_grad]
        if eager:
            options.update(update="eager", optimizer=par.SGD(parameters, lr=0.1))
        par.GradientAggregator(model, comm, **options)

    return make


def modules(name: str, odd: Callable[[], nn.Module], *words: str, usual: Any = net) -> list[Case]:
    return [
        Case(f"{name}, {update}", attach(usual, eager), attach(odd, eager), words)
        for update, eager in (("step", False), ("eager", True))
    ]


MODULES = [
    *modules("shape", lambda: net(wide=5), "parameter 0.weight", "shape (4, 3)", "shape (5, 3)"),
    *modules("dtype", lambda: net(dtype=torch.float64), "parameter 0.weight", "float32", "float64"),
    *modules("missing", lambda: net(bias=False), "parameter 0.bias", "parameter 1.weight"),
    *modules(
        "one more",
        lambda: net().append(nn.Linear(2, 2)),
        "parameter 2.weight",
        "no more parameters",
    ),
    *modules(
        "order",
        lambda: Pair("b", "a"),
        "parameter a.weight",
        "parameter b.weight",
        usual=lambda: Pair("a", "b"),
    ),
    *modules("frozen", frozen, "parameter 1.bias", "not trained"),
    *modules("strides", transposed, "parameter 0.weight", "strides (3, 1)", "strides (1, 4)"),
    *modules("buffer", with_buffer, "buffer 1.scale", "no more buffers"),
]
OPTIONS = [
    Case("op=", attach(), attach(op="sum"), ("op='avg'", "op='sum'")),
    Case("update=", attach(), attach(eager=True), ("update='step'", "update='eager'")),
    Case("bucket_bytes=", attach(), attach(bucket_bytes=64), ("bucket_bytes=64", "=26214400")),
    Case(
        "share_parameters=",
        attach(eager=True),
        attach(eager=True, share_parameters=True),
        ("share_parameters=True", "share_parameters=False"),
    ),
    Case("max_norm=", attach(max_norm=1.0), attach(max_norm=2.0), ("max_norm=1.0", "max_norm=2.0")),
]


@pytest.mark.parametrize("n", [2, 3])
def test_modules_and_options_that_differ(n: int) -> None:
    check(n, [*MODULES, *OPTIONS])


class Training:
    """A module, its optimizer and aggregator; a bucket for each parameter."""

    def __init__(self, comm: par.Communicator, eager: bool, lr: float = 0.1) -> None:
        self.model = net()
        self.optimizer = par.SGD(self.model.parameters(), lr=lr)
        update = "eager" if eager else "step"
        self.aggregator = par.GradientAggregator(
            self.model, comm, bucket_bytes=1, optimizer=self.optimizer, update=update
        )

    def backward(self) -> None:
        self.model(torch.ones(2, 3)).sum().backward()

    def iterate(self, number: int = 1) -> None:
        for _ in range(number):
            self.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def train(eager: bool, lr: float = 0.1) -> Call:
    return lambda comm: Training(comm, eager, lr).iterate(3)


def accumulate_once(eager: bool) -> Call:
    """A no_sync() that the other ranks do not have, around a whole iteration."""

    def make(comm: par.Communicator) -> None:
        training = Training(comm, eager)
        training.iterate()
        with training.aggregator.no_sync():
            training.iterate()
        training.iterate(3)

    return make


def two_backwards(first_syncs: bool) -> Call:
    """Per iteration; with no_sync() around the first, or not."""

    def make(comm: par.Communicator) -> None:
        training = Training(comm, eager=False)
        for _ in range(3):
            with contextlib.nullcontext() if first_syncs else training.aggregator.no_sync():
                training.backward()
            training.iterate()

    return make


def lose_a_backward(comm: par.Communicator) -> None:
    training = Training(comm, eager=False)

    def fail(*_: Any) -> None:
        raise ArithmeticError

    # The bucket of the last layer's bias is on its way, that of the first layer is not.
    handle = training.model[0].weight.register_hook(fail)
    with pytest.raises(ArithmeticError):
        training.backward()
    handle.remove()
    training.iterate(3)


TRAINING = [
    Case(
        "learning rate",
        train(eager=True),
        train(eager=True, lr=0.2),
        ("update", "bucket 0, 1.bias", "iteration 1", "lr 0.1", "lr 0.2"),
    ),
    *(
        Case(
            f"no_sync on one rank, eager={eager}",
            train(eager),
            accumulate_once(eager),
            ("bucket 0, 1.bias", "iteration 2", "iteration 3"),
        )
        for eager in (False, True)
    ),
    Case(
        "two backwards, one under no_sync",
        two_backwards(first_syncs=False),
        two_backwards(first_syncs=True),
        ("bucket 0, 1.bias", "iteration 1", "iteration 2"),
    ),
    Case(
        "a backward that raised",
        train(eager=False),
        lose_a_backward,
        ("0.weight", "iteration 1", "after 1 that raised"),
    ),
]


@pytest.mark.parametrize("n", [2, 3])
def test_iterations_that_differ(n: int) -> None:
    check(n, TRAINING)


def uneven(rank: int, n: int, eager: bool) -> None:
    comm = par.init()
    training = Training(comm, eager)
    if rank == n - 1:
        training.iterate(2)
        comm.close()
        return
    with pytest.raises(
        par.PeerError, match=rf"rank {n - 1} closed .* bucket 0, 1.bias, in iteration 3"
    ):
        training.iterate(3)
    comm.close()


@pytest.mark.parametrize("eager", [False, True])
def test_a_rank_with_fewer_batches(eager: bool) -> None:
    run_ranks(3, uneven, eager)


def different_parameters_are_used(rank: int, n: int, eager: bool) -> None:
    comm = par.init()
    torch.manual_seed(0)
    model = Pair("a", "b")
    optimizer = par.SGD(model.parameters(), lr=0.1)
    update = "eager" if eager else "step"
    par.GradientAggregator(model, comm, bucket_bytes=1, optimizer=optimizer, update=update)
    for iteration in range(4):
        used = model.a if (rank + iteration) % 2 else model.b
        used(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    of_all = torch.empty(n * weights.numel())
    comm.all_gather(of_all, weights)
    assert (of_all.view(n, -1) == weights).all()
    comm.close()


@pytest.mark.parametrize("eager", [False, True])
def test_different_unused_parameters_are_no_mismatch(eager: bool) -> None:
    run_ranks(2, different_parameters_are_used, eager)


CASES = [*COMMUNICATOR, *MODULES, *OPTIONS, *TRAINING]
