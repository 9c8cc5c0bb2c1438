"""max_norm, and gradients that are not finite: what is touched (nothing) and what is reported (who, where).

That clipping equals torch.nn.utils.clip_grad_norm_ in one process is in test_aggregator.py. As there, all checks of
one size share one start of the ranks; each has a communicator of its own.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_aggregator import (
    UPDATES,
    Job,
    Mlp,
    attach,
    digest,
    gathered,
    groups_of,
    loss_of,
    outcomes_of_jobs,
    result_by_rank,
    set_lr,
    weights_of,
)
from torch import Tensor, nn

import pyallreduce as par
from ranks import Outcome

SIZES = [1, 2, 3]
MAX_NORM = 0.25  # of these networks' gradients some are longer, others are not
CHECKS: dict[str, Job] = {}


def check(fn: Job) -> Job:
    CHECKS[fn.__name__] = fn
    return fn


# --- one factor for all gradients ----------------------------------------------------------------


GIVEN_SHAPES = {
    torch.float64: (1000,),
    torch.float32: (350, 200),  # shards of more than a tile of the norm
    torch.bfloat16: (33, 3),
    torch.float16: (257,),
}


class Given(nn.Module):
    """The gradient of a parameter is what ``forward`` multiplies it by: any bits, in any dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.ones(s, dtype=d) for d, s in GIVEN_SHAPES.items())

    def forward(self, gradients: list[Tensor]) -> Tensor:
        products = [(w * g).sum().double() for w, g in zip(self.weights, gradients, strict=True)]
        return torch.stack(products).sum()


def given_gradients(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(s, generator=generator).to(d) for d, s in GIVEN_SHAPES.items()]


def aggregate(
    comm: par.Communicator, op: str, update: str, max_norm: float | None
) -> tuple[list[Tensor], list[Tensor], float | None]:
    """Gradients and weights after one step, and the norm that the report gives."""
    model, optimizer, aggregator = attach(comm, update, Given(), op=op, max_norm=max_norm)
    model(given_gradients(comm.rank)).backward()
    gradients = [w.grad.clone() for w in model.weights]
    optimizer.step()
    weights = [w.detach().clone() for w in model.weights]
    norm = aggregator.report()["grad_norm"]
    aggregator.close()
    return gradients, weights, norm


def times(gradient: Tensor, factor: float) -> Tensor:
    """In the accumulator, rounded once."""
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    return (gradient.to(wide) * torch.tensor(factor, dtype=wide)).to(gradient.dtype)


@check
def clipping_is_one_factor_for_all_gradients(comm: par.Communicator) -> None:
    for op in ("sum", "avg"):
        plain, plain_weights, nothing = aggregate(comm, op, "step", None)
        assert nothing is None
        exact = math.sqrt(math.fsum(x * x for g in plain for x in g.double().flatten().tolist()))
        norm = aggregate(comm, op, "step", exact)[2]
        assert norm == pytest.approx(exact, rel=1e-14, abs=0)
        assert (gathered(comm, torch.tensor(norm, dtype=torch.float64)) == norm).all()
        # Far inside, at the last norm that is clipped, at the first that is not, far outside.
        edge = norm + 1e-6
        for max_norm in (norm / 3, math.nextafter(edge, 0), edge, 2 * norm):
            factor = min(1.0, max_norm / edge)
            assert (factor == 1) == (max_norm >= edge)
            gradients, weights, reported = aggregate(comm, op, "step", max_norm)
            assert reported == norm
            for clipped, whole in zip(gradients, plain, strict=True):
                assert torch.equal(clipped, times(whole, factor))
            assert (digest(weights) == digest(plain_weights)) == (factor == 1)
            for update in ("eager", "shared"):
                _, eager_weights, reported = aggregate(comm, op, update, max_norm)
                assert digest(eager_weights) == digest(weights)
                assert reported == norm


@check
def other_optimizers_get_clipped_gradients(comm: par.Communicator) -> None:
    """And do nothing in an iteration whose gradients are not finite."""
    digests = []
    for is_bad in (False, True):
        torch.manual_seed(0)
        model = Mlp().double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        aggregator = par.GradientAggregator(model, comm, max_norm=MAX_NORM)
        for t in range(3):
            if is_bad and t != 1:
                with bringing(model, BAD["NaN"], comm):
                    loss_of(model, comm.rank, t + 50).backward()
                assert all(p.grad is None for p in model.parameters())
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
            loss_of(model, comm.rank, t).backward()
            square = sum(p.grad.square().sum().item() for p in model.parameters())
            optimizer.step()
            norm = aggregator.report()["grad_norm"]
            assert math.sqrt(square) == pytest.approx(min(norm, MAX_NORM), rel=1e-4)
            optimizer.zero_grad(set_to_none=False)
        digests.append(digest([weights_of(model)]))
        aggregator.close()
    assert digests[0] == digests[1]


@check
def grad_scaler_is_refused(comm: par.Communicator) -> None:
    """Backward has clipped the scaled gradients; unscaling them afterwards does not mend that."""
    fused = functools.partial(torch.optim.SGD, fused=True)
    for make, unscales in itertools.product((par.SGD, fused), (False, True)):
        torch.manual_seed(0)
        model = Mlp().double()
        optimizer = make(model.parameters(), lr=0.1)
        aggregator = par.GradientAggregator(model, comm, optimizer=optimizer, max_norm=MAX_NORM)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(loss_of(model, comm.rank)).backward()
        if unscales:
            scaler.unscale_(optimizer)
        before = weights_of(model)
        with pytest.raises(par.UsageError, match=r"max_norm.*GradScaler"):
            scaler.step(optimizer)
        assert torch.equal(weights_of(model), before)
        aggregator.close()


# --- gradients that are not finite ---------------------------------------------------------------


class Wide(nn.Sequential):
    """The middle matrix is beyond what the core reduces in one phase, and beyond a tile of the norm (64 KiB)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(6, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 2)
        )


LAYOUTS: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "small buckets": (Mlp, 200),
    "small and large buckets": (Wide, 20_000),
    "one large bucket": (Wide, None),
}


@dataclass(frozen=True)
class Bad:
    """Gradient values that ranks bring along: (rank, parameter, element, value). Ranks and elements count modulo their
    number; rank None: all."""

    values: tuple[tuple[int | None, str, int, float], ...]
    rank: int | None  # to be reported
    parameter: str

    def reported(self, size: int) -> dict[str, Any]:
        rank = None if self.rank is None else self.rank % size
        return {"rank": rank, "parameter": self.parameter}


INF, NAN, MAX = math.inf, math.nan, torch.finfo(torch.float64).max
# Buckets hold the parameters in reverse: 4.bias, 4.weight, 2.bias, ... A sum overflows with two ranks at least.
BAD = {
    "NaN": Bad(((-1, "2.weight", 7, NAN),), -1, "2.weight"),
    "inf in the first element": Bad(((0, "4.bias", 0, INF),), 0, "4.bias"),
    "-inf in the last element": Bad(((-1, "0.weight", -1, -INF),), -1, "0.weight"),
    "first of several parameters": Bad(
        ((0, "0.bias", 0, NAN), (-1, "4.weight", 3, INF)), -1, "4.weight"
    ),
    "first of several elements": Bad(
        ((0, "2.weight", 20, NAN), (-1, "2.weight", 19, INF)), -1, "2.weight"
    ),
    "first of several tiles": Bad(
        ((0, "2.weight", -1, NAN), (-1, "2.weight", 12_000, NAN), (0, "0.weight", -1, INF)),
        -1,
        "2.weight",
    ),
    "first of several ranks": Bad(((-1, "2.bias", 2, NAN), (0, "2.bias", 2, INF)), 0, "2.bias"),
}
OVERFLOWS = {
    "sum": Bad(((None, "2.weight", 5, MAX),), None, "2.weight"),
    "sum before NaN": Bad(((None, "2.bias", 1, -MAX), (0, "2.weight", 0, NAN)), None, "2.bias"),
    "NaN before sum": Bad(((None, "2.bias", 1, MAX), (0, "4.weight", 1, NAN)), 0, "4.weight"),
}


def all_bad(size: int) -> list[Bad]:
    return [*BAD.values(), *(OVERFLOWS.values() if size > 1 else ())]


@contextlib.contextmanager
def bringing(model: nn.Module, bad: Bad, comm: par.Communicator) -> Iterator[None]:
    """Backward inside finds the values that are this rank's."""

    def replace(gradient: Tensor, element: int, value: float) -> Tensor:
        flat = gradient.flatten().clone()
        flat[element % len(flat)] = value
        return flat.view_as(gradient)

    handles = [
        model.get_parameter(name).register_hook(
            functools.partial(replace, element=element, value=value)
        )
        for rank, name, element, value in bad.values
        if rank is None or rank % comm.size == comm.rank
    ]
    yield
    for handle in handles:
        handle.remove()


def attach_layout(
    comm: par.Communicator, layout: str, update: str, form: str, max_norm: float | None
) -> tuple[nn.Module, par.SGD, par.GradientAggregator]:
    make, bucket_bytes = LAYOUTS[layout]
    torch.manual_seed(0)
    model = make().double()
    optimizer = par.SGD(groups_of(model), lr=0.1, form=form)
    aggregator = par.GradientAggregator(
        model,
        comm,
        bucket_bytes=bucket_bytes,
        optimizer=optimizer,
        max_norm=max_norm,
        **UPDATES[update],
    )
    return model, optimizer, aggregator


def state_of(model: nn.Module, optimizer: par.SGD) -> tuple[str, str, list[float | None]]:
    """Weights, momentum, and the unit of an absorbed momentum."""
    state = optimizer.state_dict()["state"]
    buffers = [state[i]["momentum_buffer"] for i in sorted(state)]
    units = [group["momentum_lr"] for group in optimizer.param_groups]
    return digest([weights_of(model)]), digest(buffers), units


def skip_bad_iteration(
    comm: par.Communicator,
    model: nn.Module,
    optimizer: par.SGD,
    aggregator: par.GradientAggregator,
    bad: Bad,
    accumulates: bool,
) -> None:
    before = state_of(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.7  # to which an absorbed momentum must not change its unit
    with (
        aggregator.no_sync() if accumulates else contextlib.nullcontext(),
        bringing(model, bad, comm),
    ):
        loss_of(model, comm.rank, 50).backward()
    if accumulates:
        loss_of(model, comm.rank, 51).backward()
    optimizer.step()
    assert state_of(model, optimizer) == before
    assert not aggregator.torn
    report = aggregator.report()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["nonfinite"] == bad.reported(comm.size)
    assert report["grad_norm"] is None
    optimizer.zero_grad(set_to_none=accumulates)


def train_among(
    comm: par.Communicator, layout: str, update: str, form: str, bads: list[Bad | None]
) -> Any:
    """One good iteration for each of ``bads``, after a bad one where it is not None."""
    model, optimizer, aggregator = attach_layout(comm, layout, update, form, MAX_NORM)
    for t, bad in enumerate(bads):
        if bad is not None:
            skip_bad_iteration(comm, model, optimizer, aggregator, bad, accumulates=t % 2 == 1)
        set_lr(optimizer, t)
        loss_of(model, comm.rank, t).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=t % 3 == 0)
        report = aggregator.report()
        assert report["nonfinite"] is None
        assert report["grad_norm"] > 0
    state = state_of(model, optimizer)
    aggregator.close()
    return state


@check
def iterations_that_are_not_finite_leave_no_trace(comm: par.Communicator) -> None:
    bads: list[Bad | None] = [*all_bad(comm.size)]
    for layout, form in itertools.product(LAYOUTS, ("reference", "absorbed")):
        want = train_among(comm, layout, "step", form, [None] * len(bads))
        for update in UPDATES:
            assert train_among(comm, layout, update, form, [None] * len(bads)) == want
            for order in (bads, bads[::-1]):  # each end is once the very first iteration
                assert train_among(comm, layout, update, form, order) == want, (layout, update)


@check
def without_max_norm_it_is_reported_only(comm: par.Communicator) -> None:
    for layout, update, bad in itertools.product(LAYOUTS, UPDATES, all_bad(comm.size)):
        model, optimizer, aggregator = attach_layout(comm, layout, update, "reference", None)
        loss_of(model, comm.rank, 0).backward()
        optimizer.step()
        assert aggregator.report()["nonfinite"] is None
        optimizer.zero_grad()
        with bringing(model, bad, comm):
            loss_of(model, comm.rank, 1).backward()
        if update == "step":
            assert not model.get_parameter(bad.parameter).grad.isfinite().all()
        optimizer.step()
        assert not model.get_parameter(bad.parameter).isfinite().all()
        report = aggregator.report()
        is_looked_for = comm.size > 1 or update != "step"
        assert report["nonfinite"] == (bad.reported(comm.size) if is_looked_for else None)
        assert report["grad_norm"] is None
        assert json.loads(json.dumps(report, allow_nan=False)) == report
        aggregator.close()


@check
def norm_that_overflows_touches_nothing(comm: par.Communicator) -> None:
    """Its square is beyond float64; every gradient is finite, so there is none to name."""
    huge = Bad(((0, "2.weight", 5, 1e200),), None, "2.weight")
    for update in UPDATES:
        model, optimizer, aggregator = attach_layout(
            comm, "small buckets", update, "reference", 1.0
        )
        before = state_of(model, optimizer)
        with bringing(model, huge, comm):
            loss_of(model, comm.rank).backward()
        optimizer.step()
        assert state_of(model, optimizer) == before
        report = aggregator.report()
        assert (report["nonfinite"], report["grad_norm"]) == (None, None)
        aggregator.close()


@check
def skipped_update_is_an_update_all_the_same(comm: par.Communicator) -> None:
    """A second backward before step() is refused after it, too."""
    for update in ("eager", "shared"):
        model, optimizer, aggregator = attach(comm, update, max_norm=MAX_NORM)
        before = state_of(model, optimizer)
        with bringing(model, BAD["NaN"], comm):
            loss_of(model, comm.rank).backward()
        with pytest.raises(par.UsageError, match=r"before step\(\)"):
            loss_of(model, comm.rank, 1).backward()
        optimizer.step()
        assert state_of(model, optimizer) == before
        aggregator.close()


# --- running them --------------------------------------------------------------------------------


@functools.cache
def outcomes(size: int) -> list[Outcome]:
    return outcomes_of_jobs(size, CHECKS)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", list(CHECKS))
def test_that(size: int, name: str) -> None:
    result_by_rank(outcomes(size), name)
