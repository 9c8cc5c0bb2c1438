"""par.SGD of parameters on a GPU against the same on the CPU, bit for bit: over the kernels' twin on host memory
everywhere, and on a GPU where there is one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mocked
import pytest
import torch
from torch import nn

import pyallreduce as par
from pyallreduce import gpu


@dataclass
class Place:
    """Where the parameters lie: a mocked GPU or a real one."""

    mock: mocked.MockedGpu | None

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.mock.put(tensor.clone()) if self.mock else tensor.to("cuda")

    def parameter(self, tensor: torch.Tensor) -> nn.Parameter:
        param = nn.Parameter(self.put(tensor))
        if self.mock:
            self.mock.put(param.data)
        return param


@pytest.fixture(params=["mock", pytest.param("gpu", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == "gpu":
        yield Place(None)
        return
    before = gpu.of
    yield Place(mocked.install())
    gpu.of = before


SHAPES = [(3, 5), (64,), (16, 3, 3, 3), (1,), (4097,)]
FORMS: list[dict[str, Any]] = [
    {"form": "reference"},
    {"form": "reference", "nesterov": False, "momentum": 0.0},
    {"form": "absorbed"},
    {"form": "absorbed", "correction": False},
    {"form": "reference", "master_weights": True},
    {"form": "absorbed", "master_weights": True},
]
RATES = [0.1, 0.1, 0.05, 0.0, 0.2, 0.02]


class Pair:
    """The same training twice: on the CPU, and where ``place`` says. Two groups; the last parameter has a gradient in
    every other step only."""

    def __init__(self, place: Place, dtype: torch.dtype, **settings: Any) -> None:
        torch.manual_seed(0)
        self.place, self.dtype = place, dtype
        weights = [torch.randn(shape).to(dtype) for shape in SHAPES]
        self.params = [[nn.Parameter(w.clone()) for w in weights]]
        self.params.append([place.parameter(w) for w in weights])
        self.optimizers = [
            par.SGD([{"params": p[:2]}, {"params": p[2:], "weight_decay": 0.0}], 0.1, **settings)
            for p in self.params
        ]

    def gradients(self, step: int) -> None:
        for i, (on_host, there) in enumerate(zip(*self.params, strict=True)):
            grad = torch.randn(on_host.shape).to(self.dtype)
            on_host.grad, there.grad = grad, self.place.put(grad)
            if i == len(SHAPES) - 1 and step % 2:
                on_host.grad = there.grad = None

    def step(self, lr: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

    def assert_equal(self) -> None:
        host, there = self.optimizers
        for param, other in zip(*self.params, strict=True):
            assert torch.equal(param, other.cpu())
            assert host.state[param].keys() == there.state[other].keys()
            for name, tensor in host.state[param].items():
                assert torch.equal(tensor, there.state[other][name].cpu())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_bits_are_those_of_the_cpu(
    place: Place, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    pair = Pair(place, dtype, **settings)
    for step, lr in enumerate(RATES):
        pair.gradients(step)
        pair.step(lr)
        pair.assert_equal()


def _doubled_momentum(optimizer: par.SGD, params: list[nn.Parameter], place: Place) -> None:
    state = optimizer.state[params[1]]
    state["momentum_buffer"] = 2 * state["momentum_buffer"]


def _other_memory(optimizer: par.SGD, params: list[nn.Parameter], place: Place) -> None:
    params[1].data = 2 * params[1].data
    if place.mock and place.mock.holds(params[0]):
        place.mock.put(params[1].data)


def _other_order(optimizer: par.SGD, params: list[nn.Parameter], place: Place) -> None:
    grad = params[2].grad
    params[2].grad = torch.empty_like(grad, memory_format=torch.channels_last).copy_(grad)


def _other_order_of_the_same_memory(
    optimizer: par.SGD, params: list[nn.Parameter], place: Place
) -> None:
    like = params[2].detach().to(memory_format=torch.channels_last)
    params[2].grad = params[2].grad.as_strided(like.shape, like.stride())


def _other_group(optimizer: par.SGD, params: list[nn.Parameter], place: Place) -> None:
    moved = optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[1]["params"].insert(0, moved)


def _loaded_weights(optimizer: par.SGD, params: list[nn.Parameter], place: Place) -> None:
    with torch.no_grad():
        params[1].mul_(2)


CHANGES: dict[str, Any] = {
    "nothing": lambda *_: None,
    "state": lambda optimizer, *_: optimizer.state.clear(),
    "momentum": _doubled_momentum,
    "weights": _other_memory,
    "loaded": _loaded_weights,
    "group": _other_group,
    "order": _other_order,
    "strides": _other_order_of_the_same_memory,
    "none": lambda _, params, __: setattr(params[0], "grad", None),
    "plain": lambda optimizer, *_: optimizer.param_groups[0].update(momentum=0.0, nesterov=False),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kept", [False, True], ids=["float32", "masters"])
def test_what_changes_between_steps_counts(place: Place, change: str, kept: bool) -> None:
    """Gradients stay where they are, as in buckets: then a step looks only for what has moved."""
    pair = Pair(place, torch.bfloat16 if kept else torch.float32, master_weights=kept)
    pair.gradients(0)
    for step in range(6):
        if step == 3:
            for optimizer, params in zip(pair.optimizers, pair.params, strict=True):
                CHANGES[change](optimizer, params, place)
        for grads in zip(*([p.grad for p in params] for params in pair.params), strict=True):
            if grads[0] is not None:
                fresh = torch.randn(grads[0].shape)
                for grad in grads:
                    grad.copy_(fresh)
        pair.step(0.1)
        pair.assert_equal()


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_an_overflow_touches_nothing_and_scaled_gradients_are_divided(
    place: Place, settings: dict[str, Any]
) -> None:
    """As GradScaler calls it. An overflow comes together with a new learning rate: no unit may change. Rates are exact
    in float32, as the device keeps them then."""
    pair = Pair(place, torch.float32, **settings)
    found = [torch.zeros(1), place.put(torch.zeros(1))]
    scale = [torch.tensor([8.0]), place.put(torch.tensor([8.0]))]
    for step, (lr, overflow) in enumerate(
        zip([0.5, 0.5, 0.25, 0.0, 1.0, 0.125], itertools.cycle([0.0, 1.0, 0.0]), strict=False)
    ):
        pair.gradients(step)
        for optimizer, inf, factor in zip(pair.optimizers, found, scale, strict=True):
            optimizer.found_inf, optimizer.grad_scale = inf.fill_(overflow), factor
        before = [param.clone() for param in pair.params[1]]
        pair.step(lr)
        pair.assert_equal()
        if overflow:
            assert all(map(torch.equal, before, pair.params[1]))
    for host, there in zip(
        *(optimizer.state_dict()["param_groups"] for optimizer in pair.optimizers), strict=True
    ):
        unit, other = host["momentum_lr"], there["momentum_lr"]
        assert unit == other


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_a_learning_rate_on_the_device(place: Place, settings: dict[str, Any]) -> None:
    pair = Pair(place, torch.float32, **settings)
    rate = place.put(torch.tensor([0.0]))
    for step, lr in enumerate([0.5, 0.25, 0.0, 0.125]):  # exact in float32
        pair.gradients(step)
        host, there = pair.optimizers
        for group, other in zip(host.param_groups, there.param_groups, strict=True):
            group["lr"], other["lr"] = lr, rate.fill_(lr)
        host.step()
        there.step()
        pair.assert_equal()
    pair.optimizers[1].param_groups[0]["lr"] = place.put(torch.zeros(1, dtype=torch.float64))
    with pytest.raises(par.UsageError, match="float32 is needed"):
        pair.optimizers[1].step()


def test_a_state_goes_to_the_device_and_back(place: Place) -> None:
    pair = Pair(place, torch.float32, form="absorbed")
    other = Pair(place, torch.float32, form="absorbed")
    found = place.put(torch.zeros(1))
    pair.optimizers[1].found_inf = found  # so that the device keeps the unit
    for step in range(2):
        pair.gradients(step)
        pair.step(0.1)
    host, there = pair.optimizers
    other.optimizers[0].load_state_dict(copy.deepcopy(there.state_dict()))
    other.optimizers[1].load_state_dict(copy.deepcopy(host.state_dict()))
    for ours, theirs in zip(pair.params, other.params, strict=True):
        for param, twin in zip(ours, theirs, strict=True):
            twin.data.copy_(param.data)
    for one in (pair, other):
        torch.manual_seed(1)
        one.gradients(2)
        one.step(0.05)
        one.assert_equal()
    for param, twin in zip(pair.params[0], other.params[0], strict=True):
        torch.testing.assert_close(param, twin)


def test_gradients_that_move_are_followed(place: Place) -> None:
    """The table of addresses is kept from step to step; zero_grad(set_to_none=True) makes new ones."""
    pair = Pair(place, torch.float32)
    pair.gradients(0)
    pair.step(0.1)
    kept = [param.grad for param in pair.params[1]]  # so that fresh ones lie elsewhere
    pair.gradients(0)
    pair.step(0.1)
    pair.assert_equal()
    assert all(grad is not None for grad in kept)


def test_one_device_for_all(place: Place) -> None:
    here, there = nn.Parameter(torch.ones(3)), place.parameter(torch.ones(3))
    optimizer = par.SGD([here, there], 0.1)
    here.grad, there.grad = torch.ones(3), place.put(torch.ones(3))
    with pytest.raises(par.UsageError, match="one device"):
        optimizer.step()
    assert here.tolist() == [1.0] * 3
