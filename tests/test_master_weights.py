"""par.SGD with float32 masters of 16-bit parameters. On a GPU: tests/test_{sgd,aggregator}_device.py."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import nn

import pyallreduce as par

HALVES = [torch.bfloat16, torch.float16]


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator) for shape in [(7, 5), (3, 4, 2, 2), (), (1003,)]
    ]
    tensors[1] = tensors[1].to(memory_format=torch.channels_last)
    return [nn.Parameter(t.to(dtype)) for t in tensors]


def set_gradients(params: list[nn.Parameter], t: int) -> None:
    for i, p in enumerate(params):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i))
        p.grad = torch.empty_like(p).copy_(noise)


def train(
    params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range
) -> list[nn.Parameter]:
    for t in steps:
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + t % 4)
        set_gradients(params, t)
        optimizer.step()
    return params


def masters(optimizer: par.SGD) -> list[torch.Tensor]:
    return [optimizer.state[p]["master"] for p in optimizer.param_groups[0]["params"]]


def assert_same(a: list[Any], b: list[Any]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, check_stride=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("form", ["reference", "absorbed"])
def test_is_the_training_of_float32_weights_by_rounded_gradients(
    dtype: torch.dtype, form: str
) -> None:
    params = parameters(dtype)
    optimizer = par.SGD(params, 0.1, form=form, master_weights=True)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    reference = par.SGD(wide, 0.1, form=form)
    for t in range(8):
        train(params, optimizer, range(t, t + 1))
        reference.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        for p, w in zip(params, wide, strict=True):
            w.grad = p.grad.float()
        reference.step()
        assert_same(masters(optimizer), [w.detach() for w in wide])
        assert_same([p.detach() for p in params], [w.detach().to(dtype) for w in wide])
    for p, w in zip(params, wide, strict=True):
        assert_same(
            [optimizer.state[p]["momentum_buffer"]], [reference.state[w]["momentum_buffer"]]
        )


@pytest.mark.parametrize(("kept", "expected"), [(False, 1.0), (True, 0.9)])
def test_small_steps_add_up(kept: bool, expected: float) -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = par.SGD(
        [weight], 1e-3, momentum=0, nesterov=False, weight_decay=0, master_weights=kept
    )
    for _ in range(100):  # each by less than half a unit in the last place
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.equal(weight, torch.full((4,), expected, dtype=torch.bfloat16))


def test_wider_parameters_have_none() -> None:
    params = parameters(torch.float32)
    optimizer = train_once(params)
    assert all("master" not in state for state in optimizer.state.values())


def train_once(params: list[nn.Parameter]) -> par.SGD:
    optimizer = par.SGD(params, 0.1, master_weights=True)
    train(params, optimizer, range(1))
    return optimizer


# --- who writes the parameter writes the master ----------------------------------------------------------


def test_a_loaded_model_counts_and_what_it_leaves_keeps_its_precision() -> None:
    params = parameters(torch.bfloat16)
    optimizer = train_once(params)
    before = [m.clone() for m in masters(optimizer)]
    with torch.no_grad():
        params[0][2, 3] = 5.0
    params[3].data = params[3].data.clone().fill_(2.0)
    params[1].data = params[1].data.contiguous()  # another order in memory, the same weights
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0] |= {"weight_decay": 0.0, "momentum": 0.0}
    optimizer.step()
    before[0][2, 3], before[1] = 5.0, before[1].contiguous()
    before[3].fill_(2.0)
    assert_same(masters(optimizer), before)


# --- states ----------------------------------------------------------------------------------------------


def saved(optimizer: par.SGD) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file)


def test_a_resumed_training_ends_in_the_same_bits() -> None:
    params = parameters(torch.bfloat16)
    optimizer = par.SGD(params, 0.1, master_weights=True)
    train(params, optimizer, range(5))
    others = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = par.SGD(others, 0.3, master_weights=True)
    state = saved(optimizer)
    resumed.load_state_dict(state)
    for tensor in (t for entry in state["state"].values() for t in entry.values()):
        tensor.zero_()  # a copy was made
    assert all(m.dtype == torch.float32 for m in masters(resumed))
    train(params, optimizer, range(5, 10))
    train(others, resumed, range(5, 10))
    assert_same([p.detach() for p in others], [p.detach() for p in params])
    assert_same(masters(resumed), masters(optimizer))


def test_states_of_optimizers_without_masters_and_back() -> None:
    params = parameters(torch.bfloat16)
    plain = torch.optim.SGD(params, 0.1, momentum=0.9, nesterov=True)
    train(params, plain, range(3))
    optimizer = par.SGD(params, 0.1, master_weights=True)
    optimizer.load_state_dict(plain.state_dict())
    train(params, optimizer, range(3, 4))
    momentum = optimizer.state[params[0]]["momentum_buffer"]
    assert momentum.dtype == torch.float32
    for without in (par.SGD(params, 0.1), torch.optim.SGD(params, 0.1)):
        without.load_state_dict(saved(optimizer))
        train(params, without, range(4, 5))
        assert without.state[params[0]]["momentum_buffer"].dtype == torch.bfloat16
    without = par.SGD(params, 0.1)
    without.load_state_dict(saved(optimizer))
    assert "master" not in without.state[params[0]]  # it would go stale


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alike(copier: Callable[[Any], Any]) -> None:
    params = parameters(torch.float16)
    optimizer = train_once(params)
    twin = copier(optimizer)
    others = twin.param_groups[0]["params"]
    train(others, twin, range(1, 4))
    train(params, optimizer, range(1, 4))
    assert_same([p.detach() for p in others], [p.detach() for p in params])
    assert_same(masters(twin), masters(optimizer))


def test_a_master_of_another_shape_is_refused() -> None:
    params = parameters(torch.bfloat16)
    optimizer = train_once(params)
    state = optimizer.state_dict()
    state["state"][0]["master"] = torch.zeros(3)
    optimizer.load_state_dict(state)
    set_gradients(params, 0)
    with pytest.raises(par.UsageError, match="master has shape"):
        optimizer.step()


def test_an_eager_update_on_the_host_refuses_them() -> None:
    module = nn.Linear(3, 4).bfloat16()
    optimizer = par.SGD(module.parameters(), 0.1, master_weights=True)
    with closing(par.init()) as comm, pytest.raises(par.UsageError, match="master_weights"):
        par.GradientAggregator(module, comm, optimizer=optimizer, update="eager")
