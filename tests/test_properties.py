"""Random programs of collectives, and random training runs, against one process that does the same.

A program is data, drawn here; all ranks of a pool run it. By default the same ones in every run, for less than a
minute; with HYPOTHESIS_PROFILE=search others every time, for as long as one likes (SEARCH_EXAMPLES of each test).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import operator
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_pool import RankPool
from test_communicator import bytes_in_the_core
from torch import Tensor, nn

import pyallreduce as par

SEARCH_EXAMPLES = 100_000
EXAMPLES = {
    1: 40,
    2: 50,
    3: 50,
    4: 40,
    5: 30,
}  # by number of ranks, which the machine may have too few cores for
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
_always = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", derandomize=True, database=None, **_always)
settings.register_profile("search", max_examples=SEARCH_EXAMPLES, print_blob=True, **_always)
DEADLINE = pytest.mark.deadline(
    400 if PROFILE == "ci" else 1e6
)  # finding the smallest failure takes minutes


def examples(count: int) -> settings:
    profile = settings.get_profile(PROFILE)
    return settings(profile, max_examples=count if PROFILE == "ci" else profile.max_examples)


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, RankPool]]:
    made = {size: RankPool(size) for size in range(1, 6)}
    yield made
    for pool in made.values():
        pool.close()


def digest(tensors: list[Tensor]) -> str:
    parts = [t.detach().contiguous().flatten().view(torch.uint8).numpy() for t in tensors]
    return hashlib.sha256(b"".join(p.tobytes() for p in parts)).hexdigest()


# --- collectives ---------------------------------------------------------------------------------

FLOATS = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
INTEGERS = [torch.int64, torch.int32, torch.uint8]
COMBINE = {
    "sum": operator.add,
    "avg": operator.add,
    "prod": operator.mul,
    "min": torch.minimum,
    "max": torch.maximum,
}
KINDS = ["all_reduce", "reduce_scatter", "all_gather", "broadcast", "barrier"]
PLACES = ["ordinary", "same", "elsewhere", "mixed", "shifted", "fresh"]
FORMATS = ["flat", "channels_last", "transposed"]
ARENA_BYTES = 64 << 20  # untouched pages of it cost nothing


@dataclass(frozen=True)
class Call:
    """``numel``: of the smaller tensor. ``place``: of tensors, in symmetric memory at the same offset everywhere, or at
    another on each rank, or on some ranks only; in ordinary memory off its alignment, or in symmetric memory of its
    own. ``lag``: an asynchronous call is waited for after as many others; None: waited for at once."""

    kind: str
    numel: int
    dtype: torch.dtype
    op: str
    place: str
    format: str
    root: int
    lag: int | None
    seed: int


@st.composite
def numels(draw: st.DrawFn, size: int, itemsize: int) -> int:
    """Many small ones, and those around every boundary of the core: a line, a shard, a turn, a path."""
    turn = bytes_in_the_core("kTurnBytes")
    edges = [64, 64 * size, turn // size // 64 * 64, turn, 2 * turn]
    edges += [bytes_in_the_core(f"kOnePhase{which}Bytes") for which in ("Symmetric", "")]
    near = st.builds(operator.add, st.sampled_from(edges), st.integers(-2, 2).map(itemsize.__mul__))
    choice = draw(st.integers(0, 9))
    if choice < 5:
        return draw(st.integers(0, 70))
    if choice < 9:
        return max(0, draw(near) // itemsize)
    return draw(st.integers(0, 100_000))


@st.composite
def calls(draw: st.DrawFn, size: int) -> Call:
    dtype = draw(st.sampled_from(FLOATS + INTEGERS))
    return Call(
        kind=draw(st.sampled_from(KINDS)),
        numel=draw(numels(size, dtype.itemsize)),
        dtype=dtype,
        op=draw(st.sampled_from([o for o in COMBINE if o != "avg" or dtype in FLOATS])),
        place=draw(st.sampled_from(PLACES)),
        format=draw(st.sampled_from(FORMATS)),
        root=draw(st.integers(0, size - 1)),
        lag=draw(st.one_of(st.none(), st.integers(0, 4))),
        seed=draw(st.integers(0, 2**32)),
    )


def values(call: Call, rank: int, numel: int) -> Tensor:
    """Any bits of an integer; floats of many sizes, whose sums depend on their order."""
    generator = torch.Generator().manual_seed(call.seed + rank)
    if not call.dtype.is_floating_point:
        raw = torch.randint(
            256, (numel * call.dtype.itemsize,), dtype=torch.uint8, generator=generator
        )
        return raw.view(call.dtype)
    spread = torch.randn(numel, generator=generator, dtype=torch.float64).exp()
    return (torch.randn(numel, generator=generator, dtype=torch.float64) * spread).to(call.dtype)


def combined(call: Call, by_rank: list[Tensor]) -> Tensor:
    """In rank order, in the accumulator, rounded once."""
    if call.dtype in (torch.bfloat16, torch.float16):
        by_rank = [t.float() for t in by_rank]
    total = functools.reduce(COMBINE[call.op], by_rank)
    if call.op == "avg":
        total = total * torch.tensor(1 / len(by_rank), dtype=total.dtype)
    return total.to(call.dtype)


def formatted(call: Call, flat: Tensor) -> Tensor:
    """The same memory, seen through other strides where its length allows."""
    n = flat.numel()
    if call.format == "channels_last" and n and n % 24 == 0:
        return flat.view(2, 2, 2, n // 8).permute(0, 3, 1, 2)
    if call.format == "transposed" and n and n % 6 == 0:
        return flat.view(6, n // 6).t()
    return flat


class Arena:
    """Places for tensors in one symmetric buffer; as many bytes of it are given away on every rank."""

    def __init__(self, comm: par.Communicator) -> None:
        self.comm, self.used = comm, 0
        self.memory = comm.symmetric_empty(ARENA_BYTES, torch.uint8)

    def put(self, call: Call, data: Tensor) -> Tensor:
        rank, place = self.comm.rank, call.place
        begin = self.used
        self.used += data.nbytes + 64 * self.comm.size + 64
        self.used += -self.used % 64
        if place == "fresh":
            return self.comm.symmetric_empty(data.numel(), data.dtype).copy_(data)
        if place == "shifted":
            return torch.empty(data.numel() + 1 + rank, dtype=data.dtype)[1 + rank :].copy_(data)
        if place == "ordinary" or (place == "mixed" and rank % 2 == call.root % 2):
            return data.clone()
        begin += 64 * rank if place == "elsewhere" else 0
        return self.memory[begin : begin + data.nbytes].view(data.dtype).copy_(data)


def start(arena: Arena, call: Call) -> tuple[Any, Tensor, Tensor]:
    """The Work or None, the tensor that the call writes, and what it must hold in the end."""
    comm, is_async = arena.comm, call.lag is not None
    size, rank = comm.size, comm.rank
    if call.kind == "barrier":
        comm.barrier()
        return None, torch.empty(0), torch.empty(0)
    numel = call.numel * size if call.kind == "reduce_scatter" else call.numel
    by_rank = [values(call, r, numel) for r in range(size)]
    mine = arena.put(call, by_rank[rank])
    if call.kind == "all_reduce":
        return (
            comm.all_reduce(formatted(call, mine), call.op, is_async),
            mine,
            combined(call, by_rank),
        )
    if call.kind == "broadcast":
        return comm.broadcast(formatted(call, mine), call.root, is_async), mine, by_rank[call.root]
    if call.kind == "all_gather":
        want = torch.cat(by_rank)
        output = arena.put(call, torch.zeros_like(want))
        return comm.all_gather(output, mine, is_async), output, want
    want = combined(call, by_rank)[rank * call.numel : (rank + 1) * call.numel]
    output = arena.put(call, torch.zeros_like(want))
    return comm.reduce_scatter(output, mine, call.op, is_async), output, want


def run_program(comm: par.Communicator, program: list[Call]) -> str:
    """The digest of what all ranks must have alike; asserts that everything is as one process would have it."""
    if not hasattr(comm, "test_arena"):
        comm.test_arena = Arena(comm)
    comm.test_arena.used = 0
    alike: list[Tensor] = []
    pending: list[tuple[int, Call, Any, Tensor, Tensor]] = []

    def finish(index: int, call: Call, work: Any, got: Tensor, want: Tensor) -> None:
        if work is not None:
            work.wait()
            assert work.done()
        assert torch.equal(got, want), f"call {index}, {call}"
        if call.kind != "reduce_scatter":
            alike.append(got.clone())

    for index, call in enumerate(program):
        entry = (index, call, *start(comm.test_arena, call))
        if call.lag is None:
            finish(*entry)
        else:
            pending.append(entry)
        due = [e for e in pending if e[0] + (e[1].lag or 0) <= index]
        pending = [e for e in pending if e not in due]
        for e in reversed(due):  # any order is right
            finish(*e)
    for e in pending:
        finish(*e)
    return digest(alike)


@DEADLINE
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_programs_of_collectives(size: int, pools: dict[int, RankPool]) -> None:
    @examples(EXAMPLES[size])
    @given(st.lists(calls(size), min_size=1, max_size=8))
    def run(program: list[Call]) -> None:
        assert len(set(pools[size].run(run_program, program))) == 1

    run()


# --- training ------------------------------------------------------------------------------------

WIDTH = 4
UPDATES: dict[str, dict[str, Any]] = {
    "step": {"update": "step"},
    "eager": {"update": "eager"},
    "shared": {"update": "eager", "share_parameters": True},
}


@dataclass(frozen=True)
class LayerSpec:
    kind: str  # "dead": used, with a gradient of mere zeros
    dtype: torch.dtype
    has_bias: bool
    is_frozen: bool


@dataclass(frozen=True)
class Run:
    """``used[t][micro][rank]``: which layers, as bits."""

    layers: tuple[LayerSpec, ...]
    used: tuple[tuple[tuple[int, ...], ...], ...]
    bucket_bytes: int | None
    zero: str
    op: str
    lrs: tuple[float, ...]
    momentum: float
    weight_decay: float
    nesterov: bool
    form: str
    seed: int


@st.composite
def training_runs(draw: st.DrawFn, size: int) -> Run:
    layers = draw(
        st.lists(
            st.builds(
                LayerSpec,
                kind=st.sampled_from(["linear", "conv", "scale", "empty", "dead"]),
                dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
                has_bias=st.booleans(),
                is_frozen=st.sampled_from([False, False, False, True]),
            ),
            min_size=1,
            max_size=5,
        )
    )
    steps = draw(st.integers(1, 3))
    masks = st.integers(0, 2 ** len(layers) - 1)
    micros = st.lists(st.tuples(*[masks] * size), min_size=1, max_size=3).map(tuple)
    return Run(
        layers=tuple(layers),
        used=tuple(draw(micros) for _ in range(steps)),
        bucket_bytes=draw(st.sampled_from([1, 64, 200, 1000, None])),
        zero=draw(st.sampled_from(["none", "zeros", "module"])),
        op=draw(st.sampled_from(["avg", "sum"])),
        lrs=tuple(draw(st.sampled_from([0.1, 0.05, 0.3, 0.0])) for _ in range(steps)),
        momentum=draw(st.sampled_from([0.9, 0.0])),
        weight_decay=draw(st.sampled_from([0.0, 0.01])),
        nesterov=draw(st.booleans()),
        form=draw(st.sampled_from(["reference", "absorbed"])),
        seed=draw(st.integers(0, 2**32)),
    )


class Layer(nn.Module):
    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        if spec.kind == "linear":
            self.inner: nn.Module | None = nn.Linear(WIDTH, WIDTH, bias=spec.has_bias)
        elif spec.kind == "conv":
            conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=spec.has_bias)
            self.inner = conv.to(memory_format=torch.channels_last)
        else:
            self.inner = None
            shape = (0, 3) if spec.kind == "empty" else (WIDTH, 1, 1)
            self.weight = nn.Parameter(torch.rand(shape))
        self.to(spec.dtype).requires_grad_(not spec.is_frozen)

    def forward(self, h: Tensor) -> Tensor:
        h = h.to(self.spec.dtype)
        if self.spec.kind == "linear":
            return self.inner(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.inner is not None:
            return self.inner(h)
        if self.spec.kind == "empty":
            return h + self.weight.sum()
        return h * self.weight if self.spec.kind == "scale" else h + 0 * self.weight


class Net(nn.Module):
    def __init__(self, run: Run) -> None:
        super().__init__()
        torch.manual_seed(run.seed)
        self.layers = nn.ModuleList(Layer(spec) for spec in run.layers)

    def forward(self, x: Tensor, used: int) -> Tensor:
        h = x
        for i, layer in enumerate(self.layers):
            if used >> i & 1:
                h = h + torch.tanh(layer(h)).double()
        return h


def loss_of(run: Run, net: Net, rank: int, t: int, micro: int) -> Tensor:
    seed = hash((run.seed, rank, t, micro)) % 2**63  # of numbers: the same in every process
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, WIDTH, 2, 2, generator=generator, dtype=torch.float64)
    return net(x, run.used[t][micro][rank]).square().mean()


def optimizer_of(run: Run, net: Net) -> par.SGD:
    return par.SGD(
        [p for p in net.parameters() if p.requires_grad],
        lr=0.1,
        momentum=run.momentum,
        weight_decay=run.weight_decay,
        nesterov=run.nesterov,
        form=run.form,
    )


def zero_grad(run: Run, net: Net, optimizer: par.SGD) -> None:
    if run.zero == "module":
        net.zero_grad()
    else:
        optimizer.zero_grad(set_to_none=run.zero == "none")


def train(comm: par.Communicator, run: Run) -> dict[str, list[Tensor]]:
    return {update: train_by(comm, run, update) for update in UPDATES}


def train_by(comm: par.Communicator, run: Run, update: str) -> list[Tensor]:
    net = Net(run)
    optimizer = optimizer_of(run, net)
    aggregator = par.GradientAggregator(
        net,
        comm,
        op=run.op,
        bucket_bytes=run.bucket_bytes,
        optimizer=optimizer,
        check_every=1,
        **UPDATES[update],
    )
    for t, lr in enumerate(run.lrs):
        optimizer.param_groups[0]["lr"] = lr
        last = len(run.used[t]) - 1
        for micro in range(last + 1):
            with aggregator.no_sync() if micro < last else contextlib.nullcontext():
                loss = loss_of(run, net, comm.rank, t, micro)
                if loss.requires_grad:
                    loss.backward()
                aggregator.synchronize()  # of a rank whose last micro-batch used nothing
        optimizer.step()
        zero_grad(run, net, optimizer)
    assert not aggregator.torn
    aggregator.close()
    return [p.detach().clone() for p in net.parameters()]


def train_alone(run: Run, size: int) -> list[Tensor]:
    """Every rank's gradients, one rank after the other; summed in rank order, in the accumulator."""
    net = Net(run)
    optimizer = optimizer_of(run, net)
    for t, lr in enumerate(run.lrs):
        optimizer.param_groups[0]["lr"] = lr
        by_rank = []
        for rank in range(size):
            net.zero_grad()
            for micro in range(len(run.used[t])):
                loss = loss_of(run, net, rank, t, micro)
                if loss.requires_grad:
                    loss.backward()
            by_rank.append([p.grad for p in net.parameters()])
        for p, gradients in zip(net.parameters(), zip(*by_rank, strict=True), strict=True):
            p.grad = None
            if any(g is not None for g in gradients):
                wide = torch.promote_types(p.dtype, torch.float32)
                terms = [torch.zeros_like(p) if g is None else g for g in gradients]
                total = functools.reduce(operator.add, (g.to(wide) for g in terms))
                if run.op == "avg":
                    total = total * torch.tensor(1 / size, dtype=wide)
                p.grad = total.to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


@DEADLINE
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_training_runs(size: int, pools: dict[int, RankPool]) -> None:
    @examples(EXAMPLES[size])
    @given(training_runs(size).filter(lambda run: not all(s.is_frozen for s in run.layers)))
    def run_one(run: Run) -> None:
        by_rank = pools[size].run(train, run)
        want = train_alone(run, size)
        for update in UPDATES:
            assert len({digest(results[update]) for results in by_rank}) == 1, update
            for i, (got, exact) in enumerate(zip(by_rank[0][update], want, strict=True)):
                assert torch.equal(got, exact), f"{update}, parameter {i}"

    run_one()
