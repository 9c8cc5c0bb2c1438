"""GradientAggregator against one process that does the same mathematics with torch.optim.SGD, in float64.

Ranks are processes. All cases of one size share one start of them; each has a communicator of its own, so
that one that fails leaves the others alone. Equality with the reference is within 1e-12 (another order of
summation), between ranks and between update="step", "eager" and "eager" with shared parameters it is bitwise.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import io
import itertools
import json
import math
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyallreduce as par
from ranks import Outcome, outcomes_of, run_ranks

SIZES = [1, 2, 3, 4]
STEPS = 6
MOMENTUM = 0.9
DECAY = 1e-2
DTYPE_BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}
UPDATES: dict[str, dict[str, Any]] = {
    "step": {"update": "step"},
    "eager": {"update": "eager"},
    "shared": {"update": "eager", "share_parameters": True},
}


# --- models --------------------------------------------------------------------------------------


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 2))


class Tied(nn.Module):
    """One matrix at both ends, and once more in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(6, 6) for _ in range(3))
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = torch.tanh(self.middle(h) @ self.first.weight.T)
        return self.last(h)


class Frozen(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 2))
        self[0].weight.requires_grad_(False)
        self[2].bias.requires_grad_(False)


class Branches(nn.Module):
    """Each forward uses the branches it is told to; the last is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.branches = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))

    def forward(self, x: Tensor, used: tuple[int, ...]) -> dict[str, Tensor]:
        h = torch.tanh(self.body(x))
        for i in used:
            h = h + torch.tanh(self.branches[i](h))
        return {"logits": self.head(h)}


class Conv(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(8, 4, 1),
            nn.Tanh(),
            nn.Conv2d(4, 1, 2, bias=False),
            nn.Flatten(),
        )


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(6, 8)
        self.single = nn.Linear(6, 8).float()
        self.narrow = nn.Linear(6, 8).bfloat16()
        self.scale = nn.Parameter(torch.ones(8))

    def to_test_dtype(self) -> Mixed:
        self.wide.double()
        self.scale.data = self.scale.data.double()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Side by side, so that the coarse types do not blur the fine ones."""
        outputs = self.wide(x) * self.scale, self.single(x.float()), self.narrow(x.bfloat16())
        return torch.cat([torch.tanh(out.double()) for out in outputs])


class Empty(nn.Module):
    """Parameters without elements among others; one of them alone in its dtype, hence in its bucket."""

    def __init__(self) -> None:
        super().__init__()
        self.none = nn.Parameter(torch.empty(0, 3))
        self.body = nn.Linear(6, 2)
        self.nothing = nn.Parameter(torch.empty(0, dtype=torch.float32))

    def to_test_dtype(self) -> Empty:
        self.none.data = self.none.data.double()
        self.body.double()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.none.sum() + self.nothing.sum()


class Checkpointed(nn.Module):
    """A block used twice, in checkpoints, and a matrix used inside and outside of them."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.reentrant = reentrant

    def inner(self, h: Tensor) -> Tensor:
        return torch.tanh(self.block(h) + h)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        h = torch.tanh(self.first(x))
        for _ in range(2):
            h = checkpoint(self.inner, h, use_reentrant=self.reentrant)
        return self.last(h), [h]


# --- training, on a rank and in the reference ----------------------------------------------------

Micro = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """``micros(model, rank, t)``: losses of one rank in iteration t; all but the last under no_sync()."""

    make: Callable[[], nn.Module]
    micros: Callable[[Any, int, int], list[Micro]]
    edit: Callable[[nn.Module, int], None] | None = None  # of gradients, before step()
    zero: str = "none"  # "none", "zeros", "module", "never"
    bucket_bytes: int | None = 200
    always_sync: bool = False
    create_graph: bool = False
    updates: tuple[str, ...] = tuple(UPDATES)
    max_norm: float | None = None
    form: str = "reference"
    bound: float = 0.0  # of the relative error of all, where coarse types reach the fine ones


def batch(rank: int, t: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * t + rank)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def plain(model: nn.Module, rank: int, t: int) -> list[Micro]:
    return [lambda: model(batch(rank, t, 4, 6)).square().mean()]


def images(model: nn.Module, rank: int, t: int) -> list[Micro]:
    x = batch(rank, t, 4, 3, 4, 4).to(memory_format=torch.channels_last)
    return [lambda: model(x).square().mean()]


def checkpointed(model: Checkpointed, rank: int, t: int) -> list[Micro]:
    return [lambda: model(batch(rank, t, 4, 6))[0].square().mean()]


def branch_loss(model: Branches, rank: int, t: int, used: tuple[int, ...]) -> Micro:
    return lambda: model(batch(rank, t, 4, 6), used)["logits"].square().mean()


def on_some_ranks(model: Branches, rank: int, t: int) -> list[Micro]:
    used = ((rank + t) % 3,) + ((3,) if rank == 0 and t == 1 else ())
    return [branch_loss(model, rank, t, used)]


def accumulated(model: Branches, rank: int, t: int) -> list[Micro]:
    """Branch 0 only in the first micro-batch, branch 2 there on rank 0 only."""
    first = (0, 2) if rank == 0 and t % 2 else (0,)
    return [
        branch_loss(model, rank, t + 100 * m, used) for m, used in enumerate((first, (1,), (1, 3)))
    ]


def twice(model: nn.Module, rank: int, t: int) -> list[Micro]:
    return plain(model, rank, t) + plain(model, rank, t + 100)


def edit_gradients(model: nn.Module, t: int) -> None:
    if t % 4 == 0:
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    for i, p in enumerate(model.parameters()):
        if t % 4 == 1:
            p.grad = p.grad * 0.5
        elif t % 4 == 2 and i % 2:
            p.grad = None
        elif t % 4 == 3:
            p.grad.data = p.grad.data.clone()


def channels_last() -> nn.Module:
    return Conv().to(memory_format=torch.channels_last)


CASES = {
    "plain": Case(Mlp, plain),
    "one huge bucket": Case(Mlp, plain, bucket_bytes=None),
    "buckets smaller than a parameter": Case(Mlp, plain, bucket_bytes=1),
    "zero_grad leaves zeros": Case(Mlp, plain, zero="zeros"),
    "zero_grad of the module": Case(Mlp, plain, zero="module"),
    "no zero_grad": Case(Mlp, plain, zero="never", updates=("step",)),
    "tied weights": Case(Tied, plain),
    "frozen parameters": Case(Frozen, plain),
    "unused on some ranks": Case(Branches, on_some_ranks),
    "unused on some ranks, zeros": Case(Branches, on_some_ranks, zero="zeros"),
    "unused on some ranks, one bucket": Case(Branches, on_some_ranks, bucket_bytes=None),
    "accumulation": Case(Branches, accumulated),
    "accumulation, zeros": Case(Branches, accumulated, zero="zeros"),
    "channels_last": Case(channels_last, images),
    "channels_last, zeros": Case(channels_last, images, zero="zeros", bucket_bytes=None),
    "several dtypes": Case(Mixed, plain),
    "zero elements": Case(Empty, plain, bucket_bytes=1),
    "edited gradients": Case(Mlp, plain, edit=edit_gradients, updates=("step",)),
    "edited gradients, zeros": Case(
        Mlp, plain, edit=edit_gradients, zero="zeros", updates=("step",)
    ),
    "two backwards": Case(Mlp, twice, always_sync=True, updates=("step",)),
    "create_graph": Case(Mlp, plain, create_graph=True),
    "checkpoint": Case(functools.partial(Checkpointed, False), checkpointed),
    "reentrant checkpoint": Case(functools.partial(Checkpointed, True), checkpointed),
    "absorbed": Case(Branches, on_some_ranks, form="absorbed"),
    "max_norm, always": Case(Mlp, plain, max_norm=0.01),
    "max_norm, never": Case(Mlp, plain, max_norm=100.0),
    "max_norm, at times": Case(Mlp, plain, max_norm=0.25, bucket_bytes=None),
    "max_norm, zeros": Case(Mlp, plain, max_norm=0.25, zero="zeros"),
    "max_norm, tied weights": Case(Tied, plain, max_norm=0.1),
    "max_norm, unused on some ranks": Case(Branches, on_some_ranks, max_norm=0.1),
    "max_norm, accumulation": Case(Branches, accumulated, max_norm=0.3),
    "max_norm, accumulation, absorbed": Case(
        Branches, accumulated, max_norm=0.3, form="absorbed", zero="zeros"
    ),
    "max_norm, channels_last": Case(channels_last, images, max_norm=0.05),
    "max_norm, several dtypes": Case(
        Mixed, plain, max_norm=0.05, bound=DTYPE_BOUNDS[torch.bfloat16]
    ),
    "max_norm, zero elements": Case(Empty, plain, max_norm=0.1, bucket_bytes=1),
}


@dataclass
class Trained:
    weights: dict[str, Tensor]
    momentum: dict[str, Tensor]  # as that of the reference form
    without_gradient: list[list[str]]  # names of parameters, per iteration
    norms: list[float | None]  # of the gradients before clipping, per iteration; None: no max_norm


def make(case: Case, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = case.make()
    return model.to_test_dtype() if hasattr(model, "to_test_dtype") else model.double()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]


def set_lr(optimizer: torch.optim.Optimizer, t: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.05 * (t % 4 + 1)


def zero_grad(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if case.zero == "module":
        model.zero_grad()
    elif case.zero != "never":
        optimizer.zero_grad(set_to_none=case.zero == "none")


def trained(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    without: list[list[str]],
    norms: list[float | None],
) -> Trained:
    state = optimizer.state_dict()
    order = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    buffers = {
        p: state["state"].get(i, {}).get("momentum_buffer", torch.zeros_like(p))
        / (group.get("momentum_lr") or 1.0)
        for i, (p, group) in enumerate(order)
    }
    named = dict(model.named_parameters())
    return Trained(
        {name: p.detach().clone() for name, p in named.items()},
        {name: buffers[p] for name, p in named.items() if p.requires_grad},
        without,
        norms,
    )


def train(
    comm: par.Communicator, case: Case, update: str = "step", op: str = "avg", steps: int = STEPS
) -> Trained:
    model = make(case, comm.rank)
    optimizer = par.SGD(groups_of(model), lr=0.1, momentum=MOMENTUM, form=case.form)
    aggregator = par.GradientAggregator(
        model,
        comm,
        op=op,
        bucket_bytes=case.bucket_bytes,
        optimizer=optimizer,
        max_norm=case.max_norm,
        check_every=1,  # no training run may raise an alarm
        **UPDATES[update],
    )
    without, norms = [], []
    for t in range(steps):
        set_lr(optimizer, t)
        *early, last = case.micros(model, comm.rank, t)
        for micro in early:
            with contextlib.nullcontext() if case.always_sync else aggregator.no_sync():
                scaled(micro, op, comm.size).backward()
        scaled(last, op, comm.size).backward(create_graph=case.create_graph)
        without.append([name for name, p in model.named_parameters() if p.grad is None])
        if case.edit:
            case.edit(model, t)
        optimizer.step()
        norms.append(aggregator.report()["grad_norm"])
        zero_grad(case, model, optimizer)
    assert not aggregator.torn
    result = trained(model, optimizer, without, norms)
    aggregator.close()
    return result


def scaled(micro: Micro, op: str, size: int) -> Tensor:
    return micro() / size if op == "sum" else micro()


@functools.cache
def reference(name: str, size: int) -> Trained:
    """All ranks' losses in one process, one after the other."""
    case = CASES[name]
    model = make(case, 0)
    optimizer = torch.optim.SGD(groups_of(model), lr=0.1, momentum=MOMENTUM, nesterov=True)
    without, norms = [], []
    for t in range(STEPS):
        set_lr(optimizer, t)
        for rank in range(size):
            for micro in case.micros(model, rank, t):
                (micro() / size).backward()
        without.append([n for n, p in model.named_parameters() if p.grad is None])
        norms.append(clip(model, case.max_norm))
        if case.edit:
            case.edit(model, t)
        optimizer.step()
        if case.zero != "never":
            optimizer.zero_grad()
    return trained(model, optimizer, without, norms)


def clip(model: nn.Module, max_norm: float | None) -> float | None:
    if max_norm is None:
        return None
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()


# --- cases that are not a training run: each asserts on its ranks --------------------------------

Job = Callable[[par.Communicator], Any]
CHECKS: dict[str, Job] = {}


def check(fn: Job) -> Job:
    CHECKS[fn.__name__] = fn
    return fn


def digest(tensors: list[Tensor]) -> str:
    parts = [t.detach().contiguous().flatten().view(torch.uint8).numpy() for t in tensors]
    return hashlib.sha256(b"".join(p.tobytes() for p in parts)).hexdigest()


def gathered(comm: par.Communicator, tensor: Tensor) -> Tensor:
    flat = tensor.detach().double().contiguous().flatten()
    whole = torch.empty(comm.size * flat.numel(), dtype=torch.float64)
    comm.all_gather(whole, flat)
    return whole.view(comm.size, -1)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


def attach(
    comm: par.Communicator, update: str = "step", model: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, par.SGD, par.GradientAggregator]:
    if model is None:
        model = make(CASES["plain"], comm.rank)
    optimizer = par.SGD(groups_of(model), lr=0.05, momentum=MOMENTUM)
    options = {"bucket_bytes": 200, "check_every": 1, **UPDATES[update], **options}
    return model, optimizer, par.GradientAggregator(model, comm, optimizer=optimizer, **options)


def loss_of(model: nn.Module, rank: int, t: int = 0) -> Tensor:
    return plain(model, rank, t)[0]()


def iterate(model: nn.Module, optimizer: par.SGD, rank: int, t: int) -> None:
    optimizer.zero_grad()
    loss_of(model, rank, t).backward()
    optimizer.step()


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@check
def without_aggregator_ranks_differ(comm: par.Communicator) -> None:
    model = make(CASES["plain"], 0)
    iterate(model, par.SGD(groups_of(model), lr=0.1), comm.rank, 0)
    rows = gathered(comm, weights_of(model))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(rows, 2))


@check
def sum_of_unnormalised_losses_is_size_times_too_large(comm: par.Communicator) -> None:
    by_op = {}
    for op in ("avg", "sum"):
        model, _, aggregator = attach(comm, op=op)
        loss_of(model, comm.rank).backward()
        by_op[op] = gradients(model)
        aggregator.close()
    if comm.size in (1, 2, 4):  # then the factor is exact
        assert torch.equal(by_op["sum"], comm.size * by_op["avg"])
    torch.testing.assert_close(by_op["sum"], comm.size * by_op["avg"], rtol=1e-14, atol=0)


class Buffered(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.norm.running_mean.fill_(rank + 1.5)
        self.norm.num_batches_tracked.fill_(rank + 7)
        self.register_buffer("mask", torch.tensor([rank == 0, rank != 0, True]))
        self.register_buffer("short", torch.full((2, 3), rank + 5, dtype=torch.int16).t())
        self.register_buffer("spectrum", torch.full((3,), complex(rank, rank + 1)))
        self.register_buffer("scalar", torch.tensor(rank == 0), persistent=False)
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("gaps", torch.full((4, 4), float(rank))[:, ::2])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


@check
def buffers_come_from_rank_0_and_then_are_local(comm: par.Communicator) -> None:
    model, want = Buffered(comm.rank).double(), Buffered(0).double()
    _, _, aggregator = attach(comm, model=model)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, want.get_buffer(name)), name
    loss_of(model, comm.rank).backward()
    rows = gathered(comm, model.norm.running_mean)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(rows, 2))
    assert model.norm.num_batches_tracked.item() == 8
    aggregator.close()


def load(
    model: nn.Module, optimizer: par.SGD, aggregator: par.GradientAggregator, saved: Any
) -> None:
    with aggregator.writing() as is_writer:
        if is_writer:
            model.load_state_dict(saved[0])
    optimizer.load_state_dict(copy.deepcopy(saved[1]))  # torch keeps its tensors


def checkpoint_load(comm: par.Communicator, update: str, other: str) -> None:
    model, optimizer, aggregator = attach(comm, update)
    for t in range(3):
        iterate(model, optimizer, comm.rank, t)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for t in range(3, 6):
        iterate(model, optimizer, comm.rank, t)
    final = digest([weights_of(model)])
    load(model, optimizer, aggregator, saved)
    for t in range(3, 6):
        iterate(model, optimizer, comm.rank, t)
    assert digest([weights_of(model)]) == final
    aggregator.close()
    # Into fresh objects, under the other kind of update.
    model, optimizer, aggregator = attach(comm, other)
    iterate(model, optimizer, comm.rank, 77)
    load(model, optimizer, aggregator, saved)
    for t in range(3, 6):
        iterate(model, optimizer, comm.rank, t)
    assert digest([weights_of(model)]) == final
    aggregator.close()


@check
def checkpoint_after_attaching_step(comm: par.Communicator) -> None:
    checkpoint_load(comm, "step", "eager")


@check
def checkpoint_after_attaching_shared(comm: par.Communicator) -> None:
    checkpoint_load(comm, "shared", "step")


@check
def checkpoint_after_attaching_eager(comm: par.Communicator) -> None:
    checkpoint_load(comm, "eager", "shared")


@check
def state_is_loaded_outside_of_writing_where_every_rank_has_its_own(comm: par.Communicator) -> None:
    for update in ("step", "eager"):
        model, optimizer, aggregator = attach(comm, update)
        iterate(model, optimizer, comm.rank, 0)
        saved = copy.deepcopy(model.state_dict())
        iterate(model, optimizer, comm.rank, 1)
        model.load_state_dict(saved)
        assert torch.equal(weights_of(model), torch.cat([v.flatten() for v in saved.values()]))
        iterate(model, optimizer, comm.rank, 2)
        rows = gathered(comm, weights_of(model))
        assert (rows == rows[0]).all()
        aggregator.close()


@check
def optimizer_with_a_history_can_be_attached(comm: par.Communicator) -> None:
    digests = set()
    for options in UPDATES.values():
        model = make(CASES["plain"], 0)
        optimizer = par.SGD(groups_of(model), lr=0.05, momentum=MOMENTUM)
        iterate(model, optimizer, 0, 50)
        aggregator = par.GradientAggregator(model, comm, optimizer=optimizer, **options)
        iterate(model, optimizer, comm.rank, 0)
        digests.add(digest([weights_of(model)]))
        aggregator.close()
    assert len(digests) == 1


@check
def assigned_parameter_memory_is_adopted(comm: par.Communicator) -> None:
    digests = set()
    for update in UPDATES:
        model, optimizer, aggregator = attach(comm, update)
        iterate(model, optimizer, comm.rank, 0)
        with aggregator.writing() if update == "shared" else contextlib.nullcontext():
            for p in model.parameters():
                p.data = p.data * 0.5
        for t in (1, 2):
            iterate(model, optimizer, comm.rank, t)
        digests.add(digest([weights_of(model)]))
        aggregator.close()
    assert len(digests) == 1


@check
def synchronize_completes_a_rank_without_backward(comm: par.Communicator) -> None:
    for update in UPDATES:
        model, optimizer, aggregator = attach(comm, update)
        lazy = comm.size - 1
        start = weights_of(model)
        loss = loss_of(model, comm.rank)
        if comm.rank == lazy:
            aggregator.synchronize()
        else:
            loss.backward()
        aggregator.synchronize()  # idempotent, wherever it is called
        aggregator.synchronize()
        twin = make(CASES["plain"], 0)
        total = sum(
            (loss_of(twin, r) for r in range(lazy)), start=torch.zeros((), dtype=torch.float64)
        )
        if update == "step":
            if lazy == 0:
                assert all(p.grad is None for p in model.parameters())
            else:
                (total / comm.size).backward()
                torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-12, atol=0)
                assert len({tuple(row.tolist()) for row in gathered(comm, gradients(model))}) == 1
        optimizer.step()
        assert torch.equal(weights_of(model), start) == (lazy == 0)
        iterate(model, optimizer, comm.rank, 1)
        rows = gathered(comm, weights_of(model))
        assert (rows == rows[0]).all()
        aggregator.close()


@check
def close_gives_every_rank_weights_and_momentum_of_its_own(comm: par.Communicator) -> None:
    for update in ("eager", "shared"):
        close_and_go_on_alone(comm, update)


def close_and_go_on_alone(comm: par.Communicator, update: str) -> None:
    model, optimizer, aggregator = attach(comm, update)
    iterate(model, optimizer, comm.rank, 0)
    shared = model[0].weight.data, optimizer.state[model[0].weight]["momentum_buffer"]
    aggregator.close()
    aggregator.close()
    before = weights_of(model), copy.deepcopy(optimizer.state_dict()["state"])
    comm.barrier()
    if comm.rank == 0:
        for tensor in (*shared, *model.parameters()):
            tensor.detach().fill_(1e9)
        for state in optimizer.state.values():
            state["momentum_buffer"].fill_(1e9)
    comm.barrier()
    if comm.rank != 0:
        assert torch.equal(weights_of(model), before[0])
        for i, state in optimizer.state_dict()["state"].items():
            assert torch.equal(state["momentum_buffer"], before[1][i]["momentum_buffer"])
    optimizer.zero_grad()
    loss_of(model, comm.rank, 1).backward()  # local from now on
    rows = gathered(comm, gradients(model))
    assert comm.size == 1 or not torch.equal(rows[0], rows[-1])
    start = weights_of(model)
    optimizer.step()
    assert not torch.equal(weights_of(model), start)
    with pytest.raises(par.UsageError, match="closed"):
        aggregator.synchronize()
    aggregator.report()
    iterate(*attach(comm, update, model=model)[:2], comm.rank, 2)  # and attaches again


@check
def shared_parameters_are_one_copy(comm: par.Communicator) -> None:
    for update in UPDATES:
        model, optimizer, aggregator = attach(comm, update)
        iterate(model, optimizer, comm.rank, 0)
        comm.barrier()
        if comm.rank == 0:
            for p in model.parameters():
                p.data.fill_(7)  # behind the back of the version counters
        comm.barrier()
        assert (weights_of(model) == 7).all() == (update == "shared" or comm.rank == 0)
        aggregator.close()


@check
def one_rank_of_the_host_writes_shared_parameters(comm: par.Communicator) -> None:
    for update in UPDATES:
        model, optimizer, aggregator = attach(comm, update)
        iterate(model, optimizer, comm.rank, 0)
        with aggregator.writing() as is_writer, torch.no_grad():
            if is_writer:
                for p in model.parameters():
                    p.fill_(comm.rank + 3)
        writers = gathered(comm, torch.tensor([is_writer])).flatten().nonzero().flatten().tolist()
        if update == "shared":
            (writer,) = writers
            assert (weights_of(model) == writer + 3).all()
        else:
            assert writers == [*range(comm.size)]
            assert (weights_of(model) == comm.rank + 3).all()
        aggregator.close()


@check
def writing_waits_for_readers_before_and_for_the_writer_after(comm: par.Communicator) -> None:
    model, optimizer, aggregator = attach(comm, "shared")
    iterate(model, optimizer, comm.rank, 0)
    before = gathered(comm, weights_of(model))[0]
    if comm.rank != 0:
        time.sleep(0.1)  # the writer is at the door
        assert torch.equal(weights_of(model), before)
    with aggregator.writing() as is_writer, torch.no_grad():
        if is_writer:
            time.sleep(0.1)  # the others are through
            for p in model.parameters():
                p.fill_(3)
    assert (weights_of(model) == 3).all()
    aggregator.close()


def assign(model: nn.Module, state: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.data = state[name].clone()


@check
def shared_parameters_can_be_written_by_one_or_by_all(comm: par.Communicator) -> None:
    """To the bits of ranks that have parameters of their own."""
    writers = [("step", True, assign)]
    writers += itertools.product(["shared"], [False, True], [assign, nn.Module.load_state_dict])
    state = make(CASES["plain"], 5).state_dict()
    digests = set()
    for update, by_all, write in writers:
        model, optimizer, aggregator = attach(comm, update)
        iterate(model, optimizer, comm.rank, 0)
        with aggregator.writing() as is_writer:
            if by_all or is_writer:
                write(model, state)
        assert torch.equal(weights_of(model), torch.cat([v.flatten() for v in state.values()]))
        iterate(model, optimizer, comm.rank, 1)
        digests.add(digest([weights_of(model)]))
        aggregator.close()
    assert len(digests) == 1


@check
def other_writes_to_shared_parameters_are_refused(comm: par.Communicator) -> None:
    state = make(CASES["plain"], 5).state_dict()
    writes: list[tuple[str, Callable[[nn.Module], Any]]] = [
        ("2.weight", lambda m: m[2].weight.mul_(2)),
        ("4.weight", lambda m: m[4].weight.mul_(2)),  # not the first of its bucket
        ("0.bias", lambda m: setattr(m[0].bias, "data", m[0].bias.data.clone())),
        ("4.bias", lambda m: m.load_state_dict(state)),  # the first of its bucket, of all that are
    ]
    for name, write in writes:
        model, optimizer, aggregator = attach(comm, "shared")
        for t in range(2):
            iterate(model, optimizer, comm.rank, t)
            with torch.no_grad():
                write(model)
            for _ in range(2):
                with pytest.raises(par.UsageError, match=rf"{name} was written.*writing\(\)"):
                    model(batch(comm.rank, t, 4, 6))
            with aggregator.writing():
                pass
            iterate(model, optimizer, comm.rank, t + 10)
        rows = gathered(comm, weights_of(model))
        assert (rows == rows[0]).all()
        assert not aggregator.torn
        aggregator.close()


@check
def version_counters_are_bumped(comm: par.Communicator) -> None:
    for update in UPDATES:
        model, optimizer, aggregator = attach(comm, update)
        stale = loss_of(model, comm.rank, 1)
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, comm.rank, 0).backward()
        optimizer.step()
        with aggregator.no_sync(), pytest.raises(RuntimeError, match="inplace operation"):
            stale.backward()
        aggregator.close()
    # Gradients too: their memory is written by the aggregation.
    model, _, aggregator = attach(comm)
    loss_of(model, comm.rank, 0).backward()
    factor = torch.ones_like(model[4].weight, requires_grad=True)
    product = (factor * model[4].weight.grad).sum()  # saves the gradient
    loss_of(model, comm.rank, 1).backward()
    with pytest.raises(RuntimeError, match="inplace operation"):
        product.backward()
    aggregator.close()


@check
def gradient_dropped_after_no_sync_is_gone(comm: par.Communicator) -> None:
    model = make(CASES["accumulation"], 0)
    for bucket_bytes, drop in itertools.product((1, None), ("none", "replace")):
        _, _, aggregator = attach(comm, model=model, bucket_bytes=bucket_bytes)
        model.zero_grad()
        with aggregator.no_sync():
            branch_loss(model, comm.rank, 0, (0,))().backward()
        for p in model.parameters():
            p.grad = None if drop == "none" or p.grad is None else torch.ones_like(p)
        branch_loss(model, comm.rank, 1, (1,))().backward()
        grad = model.branches[0].weight.grad
        if drop == "none":
            assert grad is None
        else:
            assert (grad == 1).all()
        aggregator.close()


@check
def autograd_grad_aggregates_nothing(comm: par.Communicator) -> None:
    for update in UPDATES:
        model, optimizer, aggregator = attach(comm, update)
        x = batch(comm.rank, 0, 4, 6).requires_grad_()
        if comm.rank == 0:  # no collective, so that the others need not do it
            torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
        # A gradient penalty, as in a GAN.
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        optimizer.step()
        rows = gathered(comm, weights_of(model))
        assert (rows == rows[0]).all()
        aggregator.close()


@check
def second_backward_of_an_eager_iteration_is_refused(comm: par.Communicator) -> None:
    digests = []
    for refused in (False, True):
        model, optimizer, aggregator = attach(comm, "eager")
        for t in range(4):
            loss_of(model, comm.rank, t).backward()
            if refused:
                for context in (contextlib.nullcontext(), aggregator.no_sync()):
                    with context, pytest.raises(par.UsageError, match=r"before step\(\)"):
                        loss_of(model, comm.rank, 9).backward()
            assert not aggregator.torn
            optimizer.step()
            if t % 2:
                optimizer.zero_grad()
        digests.append(digest([weights_of(model)]))
        aggregator.close()
    assert digests[0] == digests[1]  # the refused ones have left no trace


@check
def zero_grad_is_optional_with_eager(comm: par.Communicator) -> None:
    for max_norm in (None, 0.3):
        results = [
            train(comm, replace(CASES["accumulation"], zero=kind, max_norm=max_norm), "eager")
            for kind in ("none", "zeros", "module", "never")
        ]
        assert len({digest(list(r.weights.values())) for r in results}) == 1


class Oops(Exception):
    pass


def fail(*_: Any) -> None:
    raise Oops


@check
def exception_in_forward_leaves_everything_usable(comm: par.Communicator) -> None:
    for update in UPDATES:
        digests = []
        for failing in (False, True):
            model, optimizer, aggregator = attach(comm, update)
            for t in range(3):
                if failing and comm.rank == 0:  # on one rank only
                    handle = model[2].register_forward_hook(fail)
                    with pytest.raises(Oops):
                        loss_of(model, comm.rank, t)
                    handle.remove()
                iterate(model, optimizer, comm.rank, t)
            digests.append(digest([weights_of(model)]))
            assert not aggregator.torn
            aggregator.close()
        assert digests[0] == digests[1]


@check
def exception_in_backward_on_all_ranks_leaves_everything_usable(comm: par.Communicator) -> None:
    """Some buckets are on their way when it comes."""
    digests = []
    for failing in (False, True):
        model, optimizer, aggregator = attach(comm, bucket_bytes=1)
        for t in range(4):
            if failing and t in (1, 2):
                handle = model[0].weight.register_hook(fail)
                with pytest.raises(Oops):
                    loss_of(model, comm.rank, t + 40).backward()
                handle.remove()
            if failing and t == 2:  # again without a forward
                loss = loss_of(model, comm.rank, t + 40)
                handle = model[2].weight.register_hook(fail)
                for _ in range(2):
                    with pytest.raises(Oops):
                        loss.backward(retain_graph=True)
                handle.remove()
            iterate(model, optimizer, comm.rank, t)
        assert not aggregator.torn
        digests.append(digest([weights_of(model)]))
        aggregator.close()
    assert digests[0] == digests[1]


@check
def backward_after_a_failed_one_without_forward_is_aggregated(comm: par.Communicator) -> None:
    model, optimizer, aggregator = attach(comm)
    loss = loss_of(model, comm.rank)
    handle = model[2].weight.register_hook(fail)
    with pytest.raises(Oops):
        loss.backward(retain_graph=True)
    handle.remove()
    optimizer.zero_grad()
    loss.backward()
    rows = gathered(comm, gradients(model))
    assert (rows == rows[0]).all()
    aggregator.close()


@check
def exception_in_eager_backward_tears(comm: par.Communicator) -> None:
    for update in ("eager", "shared"):
        tear(comm, update)


def tear(comm: par.Communicator, update: str) -> None:
    model, optimizer, aggregator = attach(comm, update, bucket_bytes=1)
    handle = model[0].weight.register_hook(fail)
    with pytest.raises(Oops):
        loss_of(model, comm.rank).backward()
    handle.remove()
    assert aggregator.torn
    with pytest.raises(par.UsageError, match=r"before step\(\)"):
        loss_of(model, comm.rank, 1).backward()
    optimizer.step()
    start = weights_of(model)
    loss = loss_of(model, comm.rank, 2)
    optimizer.zero_grad()  # after the forward: what the failed backward has left must go
    loss.backward()
    optimizer.step()
    assert aggregator.torn
    assert not torch.equal(weights_of(model), start)
    rows = gathered(comm, weights_of(model))
    assert (rows == rows[0]).all()
    aggregator.close()


@check
def exception_in_eager_backward_before_any_bucket_leaves_no_gradient(
    comm: par.Communicator,
) -> None:
    digests = []
    for failing in (False, True):
        model, optimizer, aggregator = attach(comm, "eager", bucket_bytes=None)
        for t in range(3):
            if failing:
                handle = model[0].weight.register_hook(fail)
                with pytest.raises(Oops):
                    loss_of(model, comm.rank, t + 40).backward()
                handle.remove()
            loss = loss_of(model, comm.rank, t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert not aggregator.torn
        digests.append(digest([weights_of(model)]))
        aggregator.close()
    assert digests[0] == digests[1]


@check
def exception_in_backward_on_one_rank_never_mixes_iterations(comm: par.Communicator) -> None:
    if comm.size == 1:
        return
    model, _, _ = attach(comm, bucket_bytes=None)
    loss = loss_of(model, comm.rank)
    if comm.rank == 0:
        handle = model[0].weight.register_hook(fail)
        with pytest.raises(Oops):
            loss.backward()
        handle.remove()
        with pytest.raises(par.MismatchError) as caught:
            loss_of(model, comm.rank, 1).backward()
    else:
        with pytest.raises(par.MismatchError) as caught:
            loss.backward()
    if comm.size > 2:
        assert caught.value.peers == (0,)
    comm.close()


def rename_bias(model: nn.Module) -> None:
    model[4].register_parameter("offset", model[4]._parameters.pop("bias"))


@check
def modules_that_differ_are_a_mismatch_everywhere(comm: par.Communicator) -> None:
    """The last rank is odd. Each error poisons its communicator, so the caller gives a new one."""
    if comm.size == 1:
        return
    comm.close()
    odd = comm.size - 1
    mine_is_odd = comm.rank == odd
    store = comm.test_store

    def expect(what: str, attempt: Callable[[par.Communicator], Any]) -> None:
        fresh = par.init(
            store=torch.distributed.PrefixStore(what, store), rank=comm.rank, size=comm.size
        )
        with pytest.raises(par.MismatchError) as caught:
            attempt(fresh)
        if comm.size > 2:
            assert caught.value.peers == (odd,), what
        fresh.close()

    def module(change: Callable[[nn.Module], Any]) -> Callable[[par.Communicator], Any]:
        def attempt(fresh: par.Communicator) -> None:
            model = make(CASES["plain"], 0)
            if mine_is_odd:
                change(model)
            attach(fresh, model=model)

        return attempt

    expect("shape", module(lambda m: m.append(nn.Linear(2, 2))))
    expect("dtype", module(lambda m: m.float()))
    expect("frozen", module(lambda m: m[0].weight.requires_grad_(False)))
    expect("name", module(rename_bias))
    expect("buffer", module(lambda m: m.register_buffer("extra", torch.ones(1))))
    expect("buckets", lambda c: attach(c, bucket_bytes=1 if mine_is_odd else 200))
    expect("op", lambda c: attach(c, op="sum" if mine_is_odd else "avg"))
    expect("update", lambda c: attach(c, "eager" if mine_is_odd else "step"))
    expect("shared", lambda c: attach(c, "shared" if mine_is_odd else "eager"))
    expect("max_norm", lambda c: attach(c, max_norm=2.0 if mine_is_odd else 1.0))
    expect("no max_norm", lambda c: attach(c, "eager", max_norm=None if mine_is_odd else 1.0))

    def other_rate(fresh: par.Communicator) -> None:
        model, optimizer, _ = attach(fresh, "eager")
        set_lr(optimizer, 1 if mine_is_odd else 0)
        loss_of(model, fresh.rank).backward()

    expect("learning rate", other_rate)


@check
def wrong_arguments_are_usage_errors(comm: par.Communicator) -> None:
    model = make(CASES["plain"], comm.rank)
    sgd = par.SGD(groups_of(model), lr=0.1)
    parameters = list(model.parameters())
    bad: list[tuple[str, dict[str, Any]]] = [
        ("op", {"op": "max"}),
        ("op", {"op": None}),
        ("bucket_bytes", {"bucket_bytes": 0}),
        ("bucket_bytes", {"bucket_bytes": -1}),
        ("bucket_bytes", {"bucket_bytes": 2.5}),
        ("update", {"update": "lazy"}),
        ("share_parameters", {"share_parameters": True}),
        ("share_parameters", {"share_parameters": True, "optimizer": sgd}),
        *(("max_norm", {"max_norm": x}) for x in (0, -1.0, math.inf, math.nan, "x", "1")),
        ("wire_dtype", {"wire_dtype": torch.bfloat16}),
        ("SGD", {"update": "eager"}),
        ("SGD", {"update": "eager", "optimizer": torch.optim.SGD(parameters, lr=0.1)}),
        ("lacks 0.weight", {"update": "eager", "optimizer": par.SGD(parameters[1:], lr=0.1)}),
        (
            "others",
            {
                "update": "eager",
                "optimizer": par.SGD([*parameters, torch.zeros(2, requires_grad=True)], lr=0.1),
            },
        ),
    ]
    for message, options in bad:
        with pytest.raises(par.UsageError, match=message):
            par.GradientAggregator(model, comm, **options)
    with pytest.raises(par.UsageError, match=r"complex|dtype"):
        par.GradientAggregator(nn.Linear(2, 2, dtype=torch.complex64), comm)
    aggregator = par.GradientAggregator(model, comm, optimizer=sgd, update="eager")
    with pytest.raises(par.UsageError, match="another aggregator"):
        par.GradientAggregator(model, comm, optimizer=sgd, update="eager")
    with pytest.raises(par.UsageError, match="fixed set"):
        sgd.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})
    aggregator.close()
    sparse = nn.Embedding(10, 3, sparse=True)
    aggregator = par.GradientAggregator(sparse, comm)
    with pytest.raises(par.UsageError, match="sparse"):
        sparse(torch.tensor([1, 2])).sum().backward()
    aggregator.close()
    assert gathered(comm, torch.ones(3)).sum() == 3 * comm.size  # still usable
    comm.close()
    with pytest.raises(par.UsageError, match="closed"):
        par.GradientAggregator(model, comm)


@check
def ddp_module_is_refused(comm: par.Communicator) -> None:
    # Only the type is looked at: a process group is not needed to make one.
    wrapped = torch.nn.parallel.DistributedDataParallel.__new__(
        torch.nn.parallel.DistributedDataParallel
    )
    with pytest.raises(par.UsageError, match="DDP"):
        par.GradientAggregator(wrapped, comm)


@check
def overflow_on_one_rank_is_skipped_by_all(comm: par.Communicator) -> None:
    model, optimizer, aggregator = attach(comm)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(4):
        optimizer.zero_grad()
        before = weights_of(model)
        factor = float("inf") if comm.rank == 0 and t in (0, 2) else 1.0
        scaler.scale(loss_of(model, comm.rank, t) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weights_of(model), before) == (t in (0, 2))
        assert bool(optimizer.state_dict()["state"]) == (t > 0)  # nor momentum, in the first
        found = {"rank": 0, "parameter": "4.bias"} if t in (0, 2) and comm.size > 1 else None
        assert aggregator.report()["nonfinite"] == found
        rows = gathered(comm, weights_of(model))
        assert (rows == rows[0]).all()
    aggregator.close()


@check
def copies_of_an_attached_module_are_on_their_own(comm: par.Communicator) -> None:
    for update in UPDATES:
        model, optimizer, aggregator = attach(comm, update)
        iterate(model, optimizer, comm.rank, 0)
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        for twin in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
            assert torch.equal(weights_of(twin), weights_of(model))
            twin.zero_grad()
            if comm.rank == 0:  # no collective, so that the others need not do it
                loss_of(twin, 0, 5).backward()
                alone = make(CASES["plain"], 0)
                alone.load_state_dict(model.state_dict())
                loss_of(alone, 0, 5).backward()
                assert torch.equal(gradients(twin), gradients(alone))
                twin[0].weight.data.fill_(1e9)
                assert not (model[0].weight == 1e9).any()
        iterate(model, optimizer, comm.rank, 1)
        rows = gathered(comm, weights_of(model))
        assert (rows == rows[0]).all()
        assert aggregator.report()["iteration"] == 2
        aggregator.close()


@check
def absorbed_form_has_the_same_bits_eagerly(comm: par.Communicator) -> None:
    digests = set()
    for options in UPDATES.values():
        model = make(CASES["plain"], comm.rank)
        optimizer = par.SGD(groups_of(model), lr=0.05, form="absorbed")
        aggregator = par.GradientAggregator(
            model, comm, bucket_bytes=200, optimizer=optimizer, **options
        )
        for t in range(5):
            set_lr(optimizer, t)
            iterate(model, optimizer, comm.rank, t)
        state = optimizer.state_dict()
        momentum = [state["state"][i]["momentum_buffer"] for i in sorted(state["state"])]
        digests.add(digest([weights_of(model), *momentum]))
        assert {group["momentum_lr"] for group in state["param_groups"]} == {0.05}
        aggregator.close()
    assert len(digests) == 1


@check
def grad_scaler_with_eager_is_refused(comm: par.Communicator) -> None:
    model, optimizer, aggregator = attach(comm, "eager")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, comm.rank)).backward()
    with pytest.raises(par.UsageError, match='update="step"'):
        scaler.step(optimizer)
    aggregator.close()


@check
def closures_and_other_optimizers(comm: par.Communicator) -> None:
    for name in ("Adam", "LBFGS"):
        model = make(CASES["plain"], comm.rank)
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
        aggregator = par.GradientAggregator(model, comm)

        def closure(model: Any = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, comm.rank)
            loss.backward()
            # What an optimizer decides by must be the same number everywhere.
            return gathered(comm, loss).mean()

        for t in range(3):
            optimizer.step(closure)
            assert aggregator.report()["iteration"] == t + 1
        rows = gathered(comm, weights_of(model))
        assert (rows == rows[0]).all()
        aggregator.close()
    for update in UPDATES:
        model, optimizer, aggregator = attach(comm, update)
        start = weights_of(model)
        loss = optimizer.step(lambda m=model: backward(loss_of(m, comm.rank)))
        assert loss.item() > 0
        assert not torch.equal(weights_of(model), start)
        aggregator.close()


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


REPORT_KEYS = {
    "iteration",
    "window_s",
    "compute_s",
    "comm_busy_s",
    "exposed_comm_s",
    "overlap_ratio",
    "skew_s",
    "slowest_rank",
    "buckets",
    "nonfinite",
    "grad_norm",
}
BUCKET_KEYS = {
    "index",
    "bytes",
    "params",
    "ready_s",
    "enqueued_s",
    "start_s",
    "end_s",
    "used_s",
}


def inspect(report: dict[str, Any], size: int) -> None:
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report.keys() >= REPORT_KEYS
    assert len(report["skew_s"]) == size
    assert min(report["skew_s"]) >= 0
    assert report["slowest_rank"] in range(size)
    busy, exposed = report["comm_busy_s"], report["exposed_comm_s"]
    hidden = busy * report["overlap_ratio"] if report["overlap_ratio"] is not None else 0.0
    assert exposed + hidden == pytest.approx(busy, abs=1e-9)
    assert (report["overlap_ratio"] is None) == (busy == 0)
    assert report["overlap_ratio"] is None or 0 <= report["overlap_ratio"] <= 1
    assert 0 <= exposed <= busy <= report["window_s"] + 1e-9
    assert 0 <= report["compute_s"] <= report["window_s"] + 1e-9
    assert [b["index"] for b in report["buckets"]] == sorted(b["index"] for b in report["buckets"])
    for bucket in report["buckets"]:
        assert bucket.keys() >= BUCKET_KEYS
        assert 0 <= bucket["ready_s"] <= bucket["enqueued_s"] <= bucket["start_s"]
        assert bucket["start_s"] <= bucket["end_s"] <= report["window_s"]
        assert 0 <= bucket["used_s"] <= report["window_s"]


@check
def report_is_consistent_and_local(comm: par.Communicator) -> None:
    for update in UPDATES:
        model, optimizer, aggregator = attach(comm, update)
        empty = aggregator.report()
        assert (empty["iteration"], empty["buckets"], empty["overlap_ratio"]) == (0, [], None)
        names = {name for name, _ in model.named_parameters()}
        for t in range(5):
            iterate(model, optimizer, comm.rank, t)
            with torch.no_grad():
                model(batch(0, 0, 4, 6))  # evaluation does not begin an iteration
            report = aggregator.report()
            inspect(report, comm.size)
            assert report["iteration"] == t + 1
            assert {p for b in report["buckets"] for p in b["params"]} == names
            assert len(report["buckets"]) > 1
        before = aggregator.report()
        loss_of(model, comm.rank).backward()
        assert aggregator.report() == before  # that of the last finished iteration
        optimizer.step()
        # Micro-batches are part of one iteration.
        with aggregator.no_sync():
            loss_of(model, comm.rank, 1).backward()
        loss_of(model, comm.rank, 2).backward()
        optimizer.step()
        report = aggregator.report()
        inspect(report, comm.size)
        assert report["iteration"] == 7
        # A step that updates somebody else's parameters ends nothing.
        loss_of(model, comm.rank, 3).backward()
        other = nn.Linear(1, 1)
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        assert aggregator.report()["iteration"] == 7
        optimizer.step()
        # Parts of the module called directly, without its own forward.
        model[4](model[2](model[0](batch(comm.rank, 0, 4, 6)))).sum().backward()
        optimizer.step()
        inspect(aggregator.report(), comm.size)
        assert aggregator.report()["iteration"] == 9
        if comm.rank == 0:
            for _ in range(3):
                aggregator.report()  # local: the others do not call it
        aggregator.close()
        inspect(aggregator.report(), comm.size)


class Around(nn.Module):
    """A layer inside of a reentrant checkpoint and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(checkpoint(self.shared, self.first(x), use_reentrant=True))


@check
def parameter_inside_and_outside_of_a_reentrant_checkpoint(comm: par.Communicator) -> None:
    """Right if its bucket is still waiting for others when the second gradient comes, else refused."""
    torch.manual_seed(0)
    model = Around().double()
    twin = copy.deepcopy(model)
    sum(loss_of(twin, r) / comm.size for r in range(comm.size)).backward()
    aggregator = par.GradientAggregator(model, comm, op="sum")
    (loss_of(model, comm.rank) / comm.size).backward()
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-12, atol=1e-15)
    aggregator.close()
    model.zero_grad()
    aggregator = par.GradientAggregator(model, comm, bucket_bytes=1)
    for t in range(2):
        with pytest.raises(par.UsageError, match="use_reentrant=False"):
            loss_of(model, comm.rank, t).backward()
    aggregator.close()


# --- running them --------------------------------------------------------------------------------

BOTH_OPS = ("plain", "accumulation", "reentrant checkpoint", "max_norm, at times")
RUNS = [
    (name, update, op)
    for name, case in CASES.items()
    for update in case.updates
    for op in (("avg", "sum") if name in BOTH_OPS else ("avg",))
]


JOBS: dict[Any, Job] = {
    **{
        (name, update, op): functools.partial(train, case=CASES[name], update=update, op=op)
        for name, update, op in RUNS
    },
    **CHECKS,
}


def do_jobs(rank: int, size: int, port: int, jobs: dict[Any, Job]) -> dict[Any, Any]:
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
    results: dict[Any, Any] = {}
    for key, job in jobs.items():
        prefix = torch.distributed.PrefixStore(repr(key), store)
        comm = par.init(timeout_s=10, store=prefix, rank=rank, size=size)
        comm.test_store = prefix
        try:
            results[key] = job(comm)
            if not comm.closed:
                comm.barrier()
        except BaseException:
            results[key] = traceback.format_exc()
        comm.close()
    return results


def outcomes_of_jobs(size: int, jobs: dict[Any, Job]) -> list[Outcome]:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # `started` keeps it from raising: ranks that hang fail every test once, not each after another deadline.
    return outcomes_of(size, do_jobs, store.port, jobs, deadline_s=100, started=lambda pids: None)


def result_by_rank(outcomes: list[Outcome], key: Any) -> list[Any]:
    by_rank = []
    for rank, outcome in enumerate(outcomes):
        value = f"no result; {outcome.trace}" if outcome.value is None else outcome.value[key]
        if isinstance(value, str):
            pytest.fail(f"rank {rank}: {value}", pytrace=False)
        by_rank.append(value)
    return by_rank


@functools.cache
def outcomes(size: int) -> list[Outcome]:
    return outcomes_of_jobs(size, JOBS)


def result(size: int, key: Any) -> list[Any]:
    return result_by_rank(outcomes(size), key)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "update", "op"), RUNS)
def test_equals_one_process(size: int, name: str, update: str, op: str) -> None:
    by_rank = result(size, (name, update, op))
    want = reference(name, size)
    bounds = {dtype: max(bound, CASES[name].bound) for dtype, bound in DTYPE_BOUNDS.items()}
    for what in ("weights", "momentum"):
        for parameter, tensor in getattr(want, what).items():
            for mine in by_rank:
                got = getattr(mine, what)[parameter]
                assert torch.equal(got, getattr(by_rank[0], what)[parameter]), (what, parameter)
            if tensor.numel():
                error = (got - tensor).abs().max() / tensor.abs().max().clamp(min=1e-30)
                assert error <= bounds[tensor.dtype], (what, parameter)
    for mine in by_rank:
        assert mine.norms == by_rank[0].norms
        if mine.norms != want.norms:  # they are not None then
            assert mine.norms == pytest.approx(want.norms, rel=bounds[torch.float64], abs=0)
    if update == "step":
        assert all(mine.without_gradient == want.without_gradient for mine in by_rank)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "op"), [(n, op) for n, update, op in RUNS if update == "eager"])
def test_all_updates_have_the_same_bits(size: int, name: str, op: str) -> None:
    step, *others = (result(size, (name, update, op))[0] for update in UPDATES)
    for other, what in itertools.product(others, ("weights", "momentum")):
        for parameter, tensor in getattr(step, what).items():
            assert torch.equal(tensor, getattr(other, what)[parameter]), (what, parameter)
        assert other.norms == step.norms


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", list(CHECKS))
def test_that(size: int, name: str) -> None:
    result(size, name)


def test_reference_has_learned_and_left_parameters_alone() -> None:
    """Else the equalities above would prove little."""
    start, end = make(CASES["plain"], 0), reference("plain", 2)
    assert (weights_of(start) - torch.cat([w.flatten() for w in end.weights.values()])).norm() > 0.1
    unused = reference("unused on some ranks", 2)
    assert {"branches.4.weight", "branches.4.bias"} <= set(unused.without_gradient[0])
    assert "branches.3.weight" not in unused.without_gradient[1]
    assert (unused.momentum["branches.4.weight"] == 0).all()
    for size in SIZES:
        assert max(reference("max_norm, never", size).norms) < 100
        assert min(reference("max_norm, always", size).norms) > 0.01
        norms = reference("max_norm, at times", size).norms
        assert min(norms) < 0.25 < max(norms)


# --- a rank dies in the middle of backward -------------------------------------------------------


def die_in_backward(rank: int, size: int, update: str, max_norm: float | None) -> dict[str, Any]:
    comm = par.init(timeout_s=20)
    model, optimizer, aggregator = attach(comm, update, bucket_bytes=1, max_norm=max_norm)
    for t in range(2):
        iterate(model, optimizer, rank, t)
    before = weights_of(model)
    optimizer.zero_grad()
    if rank == 1:  # the first layer's gradient comes last: other buckets are on their way
        model[0].weight.register_hook(lambda grad: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(par.PeerError) as caught:
        loss_of(model, rank, 2).backward()
    torn = aggregator.torn
    unchanged = torch.equal(weights_of(model), before)
    model(batch(0, 0, 4, 6))  # the network itself can still be used, to save or evaluate it
    for again in (comm.barrier, loss_of(model, rank, 3).backward):
        with pytest.raises(par.PeerError) as repeated:
            again()
        assert str(repeated.value) == str(caught.value)
    return {"peers": caught.value.peers, "torn": (torn, aggregator.torn), "unchanged": unchanged}


@pytest.mark.parametrize(
    ("update", "max_norm"),
    [("step", None), ("eager", None), ("shared", None), ("eager", 1.0), ("shared", 1.0)],
)
def test_death_in_backward(update: str, max_norm: float | None) -> None:
    outcomes = outcomes_of(3, die_in_backward, update, max_norm)
    tears = update != "step" and max_norm is None  # the norm is not known before all are reduced
    assert outcomes[1].exitcode == -signal.SIGKILL
    for rank in (0, 2):
        assert outcomes[rank].error is None, outcomes[rank].trace
        value = outcomes[rank].value
        assert value["peers"] == (1,)
        assert value["torn"] == (tears, tears)
        assert value["unchanged"] or tears  # where it is a race what is updated


def absorbed_momentum_of_an_unused_parameter(rank: int, n: int) -> list[torch.Tensor]:
    """The learning rate changes in a step in which m[1] rests: its momentum must change its unit all the same."""
    comm = par.init()
    weights = []
    for form, update in (("reference", "eager"), ("absorbed", "step"), ("absorbed", "eager")):
        torch.manual_seed(0)
        m = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]).double()
        opt = par.SGD(m.parameters(), lr=0.1, form=form)
        agg = par.GradientAggregator(m, comm, optimizer=opt, update=update)
        for lr, used in ((0.1, True), (0.5, False), (0.5, True)):
            opt.param_groups[0]["lr"] = lr
            opt.zero_grad()
            x = m[0](torch.ones(3, 2).double())
            (m[1](x) if used else x).square().sum().backward()
            opt.step()
        weights.append(m[1].weight.detach().clone())
        agg.close()
    comm.close()
    return weights


def test_absorbed_momentum_of_an_unused_parameter_changes_its_unit() -> None:
    for reference, step, eager in run_ranks(2, absorbed_momentum_of_an_unused_parameter):
        assert torch.equal(step, eager)
        assert torch.allclose(step, reference, rtol=1e-12, atol=1e-12)
