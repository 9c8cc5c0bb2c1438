"""What only a GPU can show: `make gpu-check` runs these. Without one they are skipped, loudly."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import pyallreduce as par
from benchmarks.gpu.ranks import HOSTS, environment_of
from ranks import run_ranks

pytestmark = pytest.mark.gpu
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


@pytest.fixture
def comm() -> Iterator[par.Communicator]:
    """The only rank, so that one process is enough."""
    made = par.init(30.0, store=dist.HashStore(), rank=0, size=1)
    yield made
    made.close()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 512), nn.Linear(512, 512), nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """torch raises where one of its calls would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_collectives_of_one_rank(comm: par.Communicator, dtype: torch.dtype) -> None:
    ones = torch.ones(1000, device="cuda").to(dtype)
    comm.all_reduce(ones)
    comm.broadcast(ones)
    gathered, shard = torch.zeros_like(ones), torch.zeros_like(ones)
    comm.all_gather(gathered, ones)
    work = comm.reduce_scatter(shard, gathered, async_op=True)
    work.wait()
    assert shard.eq(1).all()
    torch.cuda.synchronize()
    assert work.done()


def test_a_collective_comes_after_what_was_queued_and_before_what_comes(
    comm: par.Communicator,
) -> None:
    data = torch.zeros(1 << 20, device="cuda")
    comm.all_reduce(data)  # connects
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds
        data += 1
        with no_waiting():
            work = comm.all_reduce(data, async_op=True)
            work.wait()
            data *= 2
    side.synchronize()
    assert data.eq(2).all()


WAYS: list[dict[str, Any]] = [
    {},
    {"update": "eager"},
    {"update": "eager", "sgd": {"form": "absorbed"}},
    {"update": "eager", "max_norm": 0.1},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_trains_as_without_an_aggregator_and_waits_for_nothing(
    comm: par.Communicator, way: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    way = dict(way)
    sgd, max_norm = way.pop("sgd", {}), way.get("max_norm")
    ours = Net().cuda()
    plain = copy.deepcopy(ours)
    optimizer, reference = (par.SGD(m.parameters(), 0.1, **sgd) for m in (ours, plain))
    aggregator = par.GradientAggregator(
        ours, comm, optimizer=optimizer, bucket_bytes=1 << 20, check_every=0, **way
    )
    for step in range(6):
        x = torch.randn(32, 64, device="cuda")
        with no_waiting() if step > 1 else contextlib.nullcontext():  # the first make tables
            ours(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        plain(x).square().mean().backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        reference.step()
        reference.zero_grad()
        for group in (optimizer.param_groups[0], reference.param_groups[0]):
            group["lr"] *= 0.9
    for param, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)
    torch.cuda.synchronize()
    report = aggregator.report()
    assert report["iteration"] == 6
    assert 0 < report["window_s"] < 5
    total = report["compute_s"] + report["exposed_comm_s"] + report["idle_s"]
    assert total == pytest.approx(report["window_s"])
    aggregator.close()


def test_grad_scaler_skips_an_overflow_without_waiting(comm: par.Communicator) -> None:
    torch.manual_seed(0)
    module = Net().cuda()
    optimizer = par.SGD(module.parameters(), 0.1, form="absorbed")
    aggregator = par.GradientAggregator(module, comm, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for step in range(4):
        x = torch.randn(8, 64, device="cuda") * (float("inf") if step == 2 else 1.0)
        before = [param.detach().clone() for param in module.parameters()]
        with torch.autocast("cuda", torch.float16):
            loss = module(x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=False)
        changed = [not torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True)]
        assert any(changed) == (step != 2)
    assert scaler.get_scale() == 512.0
    aggregator.close()


def test_a_captured_step_follows_the_learning_rate() -> None:
    torch.manual_seed(0)
    module, twin = Net().cuda(), Net().cuda()
    twin.load_state_dict(module.state_dict())
    rate = torch.tensor([0.1], device="cuda")
    optimizer, plain = par.SGD(module.parameters(), 0.1), par.SGD(twin.parameters(), 0.1)
    for one in (module, twin):
        for param in one.parameters():
            param.grad = torch.ones_like(param)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()  # makes momentum and table
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for lr in (0.1, 0.05, 0.025):
        rate.fill_(lr)
        plain.param_groups[0]["lr"] = float(rate)
        graph.replay()
        plain.step()
    for param, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, other)


def test_a_compiled_module(comm: par.Communicator) -> None:
    torch.manual_seed(0)
    module = Net().cuda()
    plain = copy.deepcopy(module)
    aggregator = par.GradientAggregator(module, comm)
    compiled = torch.compile(module, backend="aot_eager")
    x = torch.randn(8, 64, device="cuda")
    compiled(x).square().mean().backward()
    plain(x).square().mean().backward()
    for param, other in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(param.grad, other.grad)
    aggregator.close()


def _shares_the_gpu(rank: int, n: int) -> list[torch.Tensor]:
    os.environ.update(environment_of(HOSTS, rank))
    torch.cuda.set_device(0)
    comm = par.init(30.0)
    mine = torch.full((1000,), float(rank + 1), device="cuda")
    comm.all_reduce(mine)
    assert mine.eq(n * (n + 1) / 2).all()
    comm.all_reduce(mine, op="avg")
    assert mine.eq((n + 1) / 2 * n).all()
    torch.manual_seed(0)
    module = Net().cuda()
    optimizer = par.SGD(module.parameters(), 0.1)
    aggregator = par.GradientAggregator(module, comm, optimizer=optimizer, update="eager")
    for step in range(3):
        torch.manual_seed(rank + 10 * step)
        module(torch.randn(8, 64, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [param.detach().cpu() for param in module.parameters()]
    aggregator.close()
    comm.close()
    return weights


def test_two_ranks_on_one_gpu() -> None:
    """NCCL takes them for two hosts (benchmarks/gpu/ranks.py)."""
    one, other = run_ranks(2, _shares_the_gpu, deadline_s=90)
    for weight, twin in zip(one, other, strict=True):
        assert torch.equal(weight, twin)
