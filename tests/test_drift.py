"""The replica-drift sentinel: whatever makes replicas differ is found and named; what does not, raises nothing.

Ranks and jobs are those of test_aggregator.py, whose training runs all compare in every iteration without an alarm.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_aggregator import CASES as TRAINING
from test_aggregator import (
    UPDATES,
    Job,
    attach,
    batch,
    branch_loss,
    digest,
    gathered,
    groups_of,
    loss_of,
    make,
    outcomes_of_jobs,
    result_by_rank,
    weights_of,
)
from torch import nn

import pyallreduce as par
from pyallreduce.drift import minority
from ranks import Outcome

SIZES = [2, 3]
BEFORE = 3  # iterations before the cause
CHECKS: dict[str, Job] = {}


def check(fn: Job) -> Job:
    CHECKS[fn.__name__] = fn
    return fn


@pytest.mark.parametrize(
    ("by_rank", "peers"),
    [
        ([5, 5], []),
        ([5, 7], [1]),
        ([7, 5, 5], [0]),
        ([5, 7, 5], [1]),
        ([5, 7, 9], [1, 2]),
        ([5, 7, 7, 5], [1, 2]),
        ([1, 2, 2, 3, 3], [1, 2, 3, 4]),
        ([1, 2, 3, 3, 4], [0, 1, 4]),
    ],
)
def test_peers_are_those_that_differ_from_most(by_rank: list[int], peers: list[int]) -> None:
    assert minority(by_rank) == peers


# --- real causes ---------------------------------------------------------------------------------

Attached = tuple[nn.Module, torch.optim.Optimizer, par.GradientAggregator]


@dataclass(frozen=True)
class Cause:
    """``act`` runs on the odd rank only, after some iterations. ``found``: the first tensor that differs, in how many
    iterations from then on it is seen."""

    act: Callable[[Any, Any, Any], Any]
    found: str
    after: int = 1  # 2: the replicas are equal until the next update
    updates: tuple[str, ...] = ("step", "eager")


def load_another_checkpoint(model: nn.Module, *_: Any) -> None:
    model.load_state_dict(make(TRAINING["plain"], 5).state_dict())


def change_outside_of_the_update(model: nn.Module, *_: Any) -> None:
    model[2].bias.data[1] += 1e-9


def flip_a_bit(model: nn.Module, *_: Any) -> None:
    model[4].weight.data.view(torch.int64)[-1, -1] ^= 1


def multiply_in_group(index: int, what: str) -> Callable[..., None]:
    def act(model: nn.Module, optimizer: Any, aggregator: Any) -> None:
        optimizer.param_groups[index][what] *= 1.5

    return act


def forget_momentum(model: nn.Module, optimizer: Any, aggregator: Any) -> None:
    """Of a checkpoint whose weights alone were restored."""
    optimizer.state.clear()


def forget_momentum_of_one(model: nn.Module, optimizer: Any, aggregator: Any) -> None:
    del optimizer.state[model[2].weight]["momentum_buffer"]


def restore_older_momentum(model: nn.Module, optimizer: Any, aggregator: Any) -> None:
    state = optimizer.state_dict()
    for kept in state["state"].values():
        kept["momentum_buffer"] = kept["momentum_buffer"] * 0.5
    optimizer.load_state_dict(state)


def update_without_the_others(model: nn.Module, optimizer: Any, aggregator: Any) -> None:
    """By another optimizer; a step more of the attached one is a mismatch (test_mismatch.py)."""
    with aggregator.no_sync():
        loss_of(model, 77).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    optimizer.zero_grad()


CAUSES = {
    "another checkpoint": Cause(load_another_checkpoint, "weights of 0.weight"),
    "outside of the update": Cause(change_outside_of_the_update, "weights of 2.bias"),
    "one bit": Cause(flip_a_bit, "weights of 4.weight"),
    "learning rate": Cause(multiply_in_group(0, "lr"), "weights of 0.weight", 2, ("step",)),
    "weight decay": Cause(
        multiply_in_group(0, "weight_decay"), "weights of 0.weight", 2, ("step",)
    ),
    "momentum factor": Cause(multiply_in_group(1, "momentum"), "weights of 0.bias", 2, ("step",)),
    "momentum not restored": Cause(forget_momentum, "momentum of 0.weight", 1, ("step",)),
    "one momentum not restored": Cause(
        forget_momentum_of_one, "momentum of 2.weight", 1, ("step",)
    ),
    "older momentum": Cause(restore_older_momentum, "momentum of 0.weight", 1, ("step",)),
    "gradients not synchronised": Cause(
        update_without_the_others, "weights of 0.weight", 1, ("step",)
    ),
}


def attach_torch_sgd(comm: par.Communicator, **options: Any) -> Attached:
    model = make(TRAINING["plain"], comm.rank)
    optimizer = torch.optim.SGD(groups_of(model), lr=0.05, momentum=0.9)
    return model, optimizer, par.GradientAggregator(model, comm, optimizer=optimizer, **options)


WAYS: dict[str, Callable[..., Attached]] = {
    **{name: functools.partial(attach, update=name) for name in UPDATES},
    "torch.optim.SGD": attach_torch_sgd,
}


def fresh_communicators(comm: par.Communicator, name: Any) -> par.Communicator:
    """An alarm poisons its communicator, so each case needs one of its own."""
    store = torch.distributed.PrefixStore(repr(name), comm.test_store)
    return par.init(store=store, rank=comm.rank, size=comm.size, timeout_s=10)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, t: int) -> None:
    optimizer.zero_grad()
    loss_of(model, rank, t).backward()
    optimizer.step()


def peers_of(odd: int, size: int) -> tuple[int, ...]:
    return (odd,) if size > 2 else (1,)  # a tie: rank 0 is right


def expect_alarm(
    comm: par.Communicator,
    attached: Attached,
    odd: int,
    found: str,
    iteration: int,
    update: str = "step",
) -> str:
    """In the next backward; and then for good."""
    model, optimizer, aggregator = attached
    peers = peers_of(odd, comm.size)
    before = digest([weights_of(model)])
    optimizer.zero_grad()
    loss = loss_of(model, comm.rank, iteration)
    with pytest.raises(par.MismatchError) as raised:
        loss.backward()
    message = str(raised.value)
    assert raised.value.peers == peers
    assert found in message
    assert f"iteration {iteration}:" in message
    assert f"differ on rank {peers[0]}." in message
    is_eager = update in ("eager", "shared")
    assert aggregator.torn == is_eager
    assert (digest([weights_of(model)]) == before) or is_eager
    for again in (comm.barrier, lambda: loss_of(model, comm.rank).backward()):
        with pytest.raises(par.MismatchError) as repeated:
            again()
        assert str(repeated.value) == message
    aggregator.close()
    return message


@check
def every_cause_is_found_and_named(comm: par.Communicator) -> None:
    for (name, cause), way, odd in itertools.product(CAUSES.items(), WAYS, (0, comm.size - 1)):
        if way not in (*cause.updates, "torch.optim.SGD"):
            continue
        own = fresh_communicators(comm, (name, way, odd))
        attached = model, optimizer, _ = WAYS[way](comm=own, check_every=1)
        for t in range(BEFORE):
            step(model, optimizer, comm.rank, t)
        if comm.rank == odd:
            cause.act(*attached)
        for t in range(cause.after - 1):
            step(model, optimizer, comm.rank, t)
        expect_alarm(own, attached, odd, cause.found, BEFORE + cause.after, way)
        own.close()


@check
def checkpoint_loaded_after_construction_is_found_at_once(comm: par.Communicator) -> None:
    for way in ("step", "eager", "torch.optim.SGD"):
        own = fresh_communicators(comm, way)
        attached = WAYS[way](comm=own, check_every=100)
        if comm.rank == 1:
            load_another_checkpoint(attached[0])
        message = expect_alarm(own, attached, 1, "weights of 0.weight", 1, way)
        assert "and 5 more of " in message
        own.close()


@check
def stale_gradients_are_aggregated_before_the_update_but_not_after(comm: par.Communicator) -> None:
    """Of a branch that no rank uses in this iteration; in DDP the first is a silent drift already."""
    model = make(TRAINING["accumulation"], comm.rank)
    optimizer = par.SGD(groups_of(model), lr=0.05)
    aggregator = par.GradientAggregator(model, comm, optimizer=optimizer, check_every=1)
    unused = model.branches[2].weight
    for t in range(5):
        optimizer.zero_grad()
        if comm.rank == 1 and t in (1, 2):
            unused.grad = torch.ones_like(unused)
        branch_loss(model, comm.rank, t, (0,))().backward()
        assert (unused.grad is None) == (t not in (1, 2))
        if comm.rank == 1 and t == 4:
            unused.grad = torch.ones_like(unused)
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(par.MismatchError, match=r"weights of branches\.2\.weight") as raised:
        branch_loss(model, comm.rank, 5, (0,))().backward()
    assert raised.value.peers == (1,)
    aggregator.close()
    comm.close()


class Frozen(nn.Module):
    """Parameters that no update touches, of types that no gradient has; statistics that are each rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(6, 2), nn.BatchNorm1d(2)
        self.mask = nn.Parameter(torch.tensor([True, False, True]), requires_grad=False)
        self.table = nn.Parameter(torch.ones(6, 6).double()[:, ::2], requires_grad=False)  # gaps
        self.empty = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.body(x))


@check
def frozen_parameters_are_compared_and_buffers_are_not(comm: par.Communicator) -> None:
    for update, name in itertools.product(UPDATES, ("mask", "table")):
        own = fresh_communicators(comm, (update, name))
        attached = model, optimizer, _ = attach(
            own, update, make_frozen(), check_every=1, bucket_bytes=1
        )
        for t in range(BEFORE):
            step(model, optimizer, comm.rank, t)
        rows = gathered(own, model.norm.running_mean)
        assert not torch.equal(rows[0], rows[1])
        if comm.rank == 1:
            changed = model.get_parameter(name).data
            changed[-1] = ~changed[-1] if name == "mask" else 7
        expect_alarm(own, attached, 1, f"weights of {name}", BEFORE + 1, update)
        own.close()


def make_frozen() -> nn.Module:
    torch.manual_seed(0)
    return Frozen().double()


@check
def state_of_any_optimizer_is_compared(comm: par.Communicator) -> None:
    for key in ("exp_avg", "exp_avg_sq", "step"):
        own = fresh_communicators(comm, key)
        model = make(TRAINING["plain"], comm.rank)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        aggregator = par.GradientAggregator(model, own, optimizer=optimizer, check_every=1)
        for t in range(BEFORE):
            step(model, optimizer, comm.rank, t)
        if comm.rank == 1:
            optimizer.state[model[2].weight][key] *= 1.5
        attached = model, optimizer, aggregator
        expect_alarm(own, attached, 1, "momentum of 2.weight", BEFORE + 1)
        own.close()


# --- when, and when not --------------------------------------------------------------------------


@check
def compares_in_the_first_and_every_so_many_th_iteration(comm: par.Communicator) -> None:
    """Micro-batches, evaluation and failed forwards do not count, on whichever rank."""
    for caused_after, found_in in ((0, 1), (1, 4), (3, 4), (4, 7)):
        own = fresh_communicators(comm, caused_after)
        attached = model, optimizer, aggregator = attach(own, check_every=3)
        for t in range(found_in - 1):
            if t == caused_after and comm.rank == 1:
                change_outside_of_the_update(model)
            if comm.rank == 0:
                model(batch(0, t, 4, 6))
            optimizer.zero_grad()
            for _ in range(t % 3):
                with aggregator.no_sync():
                    loss_of(model, comm.rank, t + 50).backward()
            loss_of(model, comm.rank, t).backward()
            optimizer.step()
        if caused_after == found_in - 1 and comm.rank == 1:
            change_outside_of_the_update(model)
        expect_alarm(own, attached, 1, "weights of 2.bias", found_in)
        own.close()


@check
def compares_after_writing(comm: par.Communicator) -> None:
    for update in ("step", "eager"):
        own = fresh_communicators(comm, update)
        attached = model, optimizer, aggregator = attach(own, update, check_every=100)
        for t in range(2):
            step(model, optimizer, comm.rank, t)
            with aggregator.writing():
                model.load_state_dict(make(TRAINING["plain"], 5).state_dict())
        step(model, optimizer, comm.rank, 2)
        with aggregator.writing():
            if comm.rank == 1:
                change_outside_of_the_update(model)
        expect_alarm(own, attached, 1, "weights of 2.bias", 4, update)
        own.close()


@check
def check_every_0_is_never(comm: par.Communicator) -> None:
    model, optimizer, aggregator = attach(comm, check_every=0)
    if comm.rank == 1:
        load_another_checkpoint(model)
    for t in range(3):
        step(model, optimizer, comm.rank, t)
        with aggregator.writing():
            pass
    rows = gathered(comm, weights_of(model))
    assert not torch.equal(rows[0], rows[1])
    aggregator.close()


@check
def ranks_must_compare_in_the_same_iterations(comm: par.Communicator) -> None:
    with pytest.raises(par.MismatchError):
        attach(comm, check_every=100 + comm.rank // (comm.size - 1))
    comm.close()


@check
def check_every_is_a_whole_number(comm: par.Communicator) -> None:
    for bad in (-1, 1.5, "100", None):
        with pytest.raises(par.UsageError, match="check_every"):
            attach(comm, check_every=bad)


@check
def equal_nan_are_equal_and_others_differ(comm: par.Communicator) -> None:
    for differ in (False, True):
        own = fresh_communicators(comm, differ)
        model, _, aggregator = attach(own, check_every=1)
        payload = comm.rank if differ else 7
        bits = model[0].weight.data.view(torch.int64)
        bits[0, 0] = 0x7FF8000000000000 | payload
        assert model[0].weight[0, 0].isnan()
        expected = pytest.raises(par.MismatchError, match=r"weights of 0\.weight differ")
        with expected if differ else contextlib.nullcontext():
            loss_of(model, comm.rank).backward()
        aggregator.close()
        own.close()


@check
def backward_that_failed_everywhere_is_compared_anew(comm: par.Communicator) -> None:
    attached = model, optimizer, _ = attach(comm, check_every=2, bucket_bytes=1)
    for t in range(2):
        step(model, optimizer, comm.rank, t)
    if comm.rank == 1:
        change_outside_of_the_update(model)
    for _ in range(2):  # the comparison is on its way when it comes
        handle = model[0].weight.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss_of(model, comm.rank).backward()
        handle.remove()
    expect_alarm(comm, attached, 1, "weights of 2.bias", 3)
    comm.close()


@check
def momentum_of_another_memory_format_is_no_drift(comm: par.Communicator) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()).double()
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    aggregator = par.GradientAggregator(model, comm, optimizer=optimizer, check_every=1)
    for t in range(3):
        optimizer.zero_grad()
        x = batch(comm.rank, t, 4, 3, 4, 4).to(memory_format=torch.channels_last)
        model(x).square().mean().backward()
        optimizer.step()
        if comm.rank == 1:
            state = optimizer.state[model[0].weight]
            state["momentum_buffer"] = state["momentum_buffer"].contiguous()
            assert not state["momentum_buffer"].is_contiguous(memory_format=torch.channels_last)
    aggregator.close()


# --- running them --------------------------------------------------------------------------------


@functools.cache
def outcomes(size: int) -> list[Outcome]:
    return outcomes_of_jobs(size, CHECKS)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", list(CHECKS))
def test_that(size: int, name: str) -> None:
    result_by_rank(outcomes(size), name)
