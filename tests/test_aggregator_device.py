"""GradientAggregator and the DDP hook on a GPU, over a mock of it: every training here runs twice, the same module on
the host and on the mock, and both end with the same bits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mocked
import pytest
import torch
from torch import nn

import pyallreduce as par
from pyallreduce import _core
from ranks import outcomes_of, run_ranks

RATES = [0.5, 0.5, 0.25, 0.125]  # exact in float32


def run_mocked(mocks: Path, n: int, fn: Any, *args: Any) -> list[Any]:
    return run_ranks(n, fn, *args, env=mocked.environment(mocks))


class Net(nn.Module):
    """``skip``: that layer is left out by odd ranks; ``never`` by all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.skip = nn.Conv2d(8, 8, 1)
        self.never = nn.Linear(4, 4)
        self.head = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor, skips: bool = False) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(images)))
        return self.head((x if skips else self.skip(x)).mean((2, 3)))


def put(gpu: mocked.MockedGpu, module: nn.Module) -> nn.Module:
    for tensor in [*module.parameters(), *module.buffers()]:
        gpu.put(tensor.data)
    return module


class Twice:
    """One training on the host and one on the mock."""

    def __init__(self, comm: par.Communicator, gpu: mocked.MockedGpu, **options: Any) -> None:
        sgd = options.pop("sgd", {})
        torch.manual_seed(comm.rank)  # the aggregator makes them equal
        host = Net().to(memory_format=options.pop("memory_format", torch.contiguous_format))
        self.modules = [host, put(gpu, copy.deepcopy(host))]
        self.optimizers = [par.SGD(m.parameters(), 0.5, **sgd) for m in self.modules]
        self.aggregators = [
            par.GradientAggregator(m, comm, optimizer=o, bucket_bytes=300, **options)
            for m, o in zip(self.modules, self.optimizers, strict=True)
        ]
        self.comm = comm
        self._seed = 100 + comm.rank

    def backward(self, skips: bool = False, times: float = 1.0) -> list[torch.Tensor]:
        self._seed += 10
        losses = []
        for module in self.modules:
            torch.manual_seed(self._seed)
            losses.append(module(torch.randn(4, 3, 6, 6), skips).square().sum() * times)
            losses[-1].backward()
        return losses

    def step(self, lr: float = 0.5, set_to_none: bool = False) -> None:
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = lr / 64
            optimizer.step()
            optimizer.zero_grad(set_to_none)

    def assert_equal(self) -> None:
        host, there = self.modules
        for (name, param), other in zip(host.named_parameters(), there.parameters(), strict=True):
            assert torch.equal(param, other), name
            assert (param.grad is None) == (other.grad is None), name
            if param.grad is not None:
                assert torch.equal(param.grad, other.grad), name
            state, twin = (o.state[p] for o, p in zip(self.optimizers, (param, other), strict=True))
            if "momentum_buffer" in state and self.optimizers[0].defaults["momentum"]:
                assert torch.equal(state["momentum_buffer"], twin["momentum_buffer"]), name

    def close(self) -> None:
        for aggregator in self.aggregators:
            aggregator.close()


WAYS: list[dict[str, Any]] = [
    {},
    {"op": "sum"},
    {"update": "eager"},
    {"update": "eager", "op": "sum", "sgd": {"form": "absorbed"}},
    {"update": "eager", "sgd": {"form": "absorbed", "correction": False, "nesterov": False}},
    {"update": "eager", "sgd": {"momentum": 0.0, "nesterov": False}},
    {"max_norm": 0.5},
    {"update": "eager", "max_norm": 0.5},
    {"update": "eager", "max_norm": 1e9, "sgd": {"form": "absorbed"}},
    {"memory_format": torch.channels_last},
    {"update": "eager", "memory_format": torch.channels_last},
]


def _trains_alike(rank: int, n: int, ways: list[dict[str, Any]]) -> None:
    gpu = mocked.install()
    comm = par.init(30.0)
    for way in ways:
        for skips in (False, True):
            both = Twice(comm, gpu, **way)
            for i, lr in enumerate(RATES):
                versions = [p._version for p in both.modules[1].parameters()]
                both.backward(skips and rank % 2 == 1)
                both.step(lr, set_to_none=i % 2 == 1)
                both.assert_equal()
                # Autograd must notice that saved weights were written.
                weight = both.modules[1].head.weight
                place = [p is weight for p in both.modules[1].parameters()].index(True)
                assert weight._version > versions[place]
            both.close()
    comm.close()


@pytest.mark.deadline(180)
@pytest.mark.parametrize("part", range(3))
def test_trains_as_on_the_host(part: int, mocks: Path) -> None:
    """Two ranks: their sum has one order. Parameters that some ranks, or all, leave out included."""
    run_mocked(mocks, 2, _trains_alike, WAYS[part::3])


def _trains_without_kernels(rank: int, n: int) -> None:
    """As installed without nvcc: torch divides, and a torch optimizer updates."""
    gpu = mocked.install()
    _core.Device.has_kernels = property(lambda self: False)  # type: ignore[assignment]
    comm = par.init(30.0)
    both = Twice(comm, gpu)
    both.optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in both.modules]
    for _ in range(3):
        both.backward()
        both.step()
        both.assert_equal()
    comm.close()


def test_averages_without_our_kernels(mocks: Path) -> None:
    run_mocked(mocks, 2, _trains_without_kernels)


def _accumulates(rank: int, n: int) -> None:
    gpu = mocked.install()
    comm = par.init(30.0)
    for way in ({}, {"update": "eager"}, {"update": "eager", "max_norm": 0.5}):
        both = Twice(comm, gpu, **way)
        for _ in range(2):
            with both.aggregators[0].no_sync(), both.aggregators[1].no_sync():
                both.backward()
            both.backward(skips=True)  # what only the first has touched counts too
            both.step()
            both.assert_equal()
        both.close()
    comm.close()


def test_accumulates(mocks: Path) -> None:
    run_mocked(mocks, 2, _accumulates)


def _overflows(rank: int, n: int) -> None:
    """With clipping an overflow changes nothing, whatever the update; only the device knows of it when it is eager."""
    gpu = mocked.install()
    comm = par.init(30.0)
    for form in ("reference", "absorbed"):
        for update in ("step", "eager"):
            both = Twice(comm, gpu, update=update, max_norm=0.5, sgd={"form": form})
            for i, lr in enumerate([0.5, 0.25, 0.125]):
                both.backward(times=float("inf") if i == 1 and rank == 0 else 1.0)
                both.step(lr)
                both.assert_equal()
                gpu.settle()
                norms = [a.report()["grad_norm"] for a in both.aggregators]
                assert (norms[0] is None) == (norms[1] is None) == (i == 1)
                if i != 1:
                    assert norms[0] == pytest.approx(norms[1])
            both.close()
    comm.close()


def test_an_overflow_under_clipping_changes_nothing(mocks: Path) -> None:
    run_mocked(mocks, 2, _overflows)


def _follows_memory(rank: int, n: int) -> None:
    gpu = mocked.install()
    comm = par.init(30.0)
    both = Twice(comm, gpu, update="eager")
    for change in (None, None, "state", "weights", None):
        for module, optimizer in zip(both.modules, both.optimizers, strict=True):
            if change == "state":
                state = copy.deepcopy(optimizer.state_dict())
                state["state"][0]["momentum_buffer"] *= 2
                comm.barrier()  # the host's momentum is one for all ranks
                optimizer.load_state_dict(state)
            if change == "weights":
                moved = module.conv.weight
                moved.data = 2 * moved.data
                if module is both.modules[1]:
                    gpu.put(moved.data)
        both.backward()
        both.step()
        both.assert_equal()
    both.close()
    comm.close()


def test_an_eager_update_follows_memory_that_moves(mocks: Path) -> None:
    run_mocked(mocks, 2, _follows_memory)


def _keeps_masters(rank: int, n: int) -> None:
    gpu = mocked.install()
    comm = par.init(30.0)
    trained = []
    for options in ({}, {"update": "eager"}, {"update": "eager", "max_norm": 1e9}):
        torch.manual_seed(0)
        module = put(gpu, nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 5)).bfloat16())
        optimizer = par.SGD(module.parameters(), 1.0, master_weights=True)
        aggregator = par.GradientAggregator(
            module, comm, optimizer=optimizer, bucket_bytes=300, check_every=1, **options
        )
        for t, lr in enumerate(RATES):
            torch.manual_seed(10 * t + rank)
            optimizer.param_groups[0]["lr"] = lr / 64
            module(torch.randn(4, 30).bfloat16()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        aggregator.close()
        states = [optimizer.state[p] for p in module.parameters()]
        for p, state in zip(module.parameters(), states, strict=True):
            assert torch.equal(p, state["master"].bfloat16())
            assert not torch.equal(p.float(), state["master"])
        trained.append([t for s in states for t in (s["master"], s["momentum_buffer"])])
    for other in trained[1:]:
        assert all(torch.equal(a, b) for a, b in zip(trained[0], other, strict=True))
    comm.close()


def test_masters_of_16_bit_weights_are_the_same_eager_or_not(mocks: Path) -> None:
    run_mocked(mocks, 2, _keeps_masters)


def _reports(rank: int, n: int) -> None:
    gpu = mocked.install()
    comm = par.init(30.0)
    both = Twice(comm, gpu, update="eager")
    aggregator = both.aggregators[1]
    for i in range(3):
        both.backward()
        both.step()
        gpu.settle()
        report = aggregator.report()
        assert report["iteration"] == i + 1
    assert len(report["buckets"]) > 2
    assert report["window_s"] > 0
    assert 0 <= report["exposed_comm_s"] <= report["comm_busy_s"] + 1e-9
    total = report["compute_s"] + report["exposed_comm_s"] + report["idle_s"]
    assert total == pytest.approx(report["window_s"])
    for bucket in report["buckets"]:
        assert bucket["ready_s"] <= bucket["end_s"]
        assert bucket["start_s"] <= bucket["end_s"] <= report["window_s"]
    ends = [bucket["end_s"] for bucket in report["buckets"]]
    assert ends == sorted(ends)
    assert {p["name"] for p in report["phases"]} == {"forward", "backward", "wait", "update"}
    assert len(report["skew_s"]) == n
    both.close()
    comm.close()


def test_reports_the_times_of_the_device(mocks: Path) -> None:
    run_mocked(mocks, 2, _reports)


def _drifts(rank: int, n: int) -> tuple[str, tuple[int, ...]]:
    gpu = mocked.install()
    comm = par.init(30.0)
    both = Twice(comm, gpu, check_every=2)
    state = both.optimizers[1].state[both.modules[1].head.bias]
    state["phase"], state["steps"] = torch.ones(3, dtype=torch.complex128), torch.tensor(3.0)
    for _ in range(3):
        both.backward()
        both.step()
    if rank == 2:
        with torch.no_grad():
            both.modules[1].head.weight[1, 2] += 1e-3
    both.backward()  # the fourth iteration is not compared
    both.step()
    with pytest.raises(par.MismatchError) as caught:
        both.backward()
    return str(caught.value), caught.value.peers


def test_drift_is_found(mocks: Path) -> None:
    for message, peers in run_mocked(mocks, 3, _drifts):
        assert "weights of head.weight" in message
        assert "differ on rank 2" in message
        assert peers == (2,)


def _wrong_use(rank: int, n: int) -> None:
    gpu = mocked.install()
    comm = par.init(30.0)
    module = Net()
    gpu.put(module.head.weight.data)
    with pytest.raises(par.UsageError, match="they must be on one device"):
        par.GradientAggregator(module, comm)
    put(gpu, module)
    optimizer = par.SGD(module.parameters(), 0.1)
    with pytest.raises(par.UsageError, match="share_parameters"):
        par.GradientAggregator(
            module, comm, optimizer=optimizer, update="eager", share_parameters=True
        )
    state = optimizer.state[module.head.weight]
    state["momentum_buffer"] = torch.zeros(3)
    with pytest.raises(par.UsageError, match="another model"):
        par.GradientAggregator(module, comm, optimizer=optimizer, update="eager")
    del state["momentum_buffer"]  # and the optimizer is as free as before
    par.GradientAggregator(module, comm, optimizer=optimizer, update="eager").close()
    both = Twice(comm, gpu, update="eager")
    both.backward()
    with pytest.raises(par.UsageError, match="second backward"):
        both.modules[1](torch.ones(1, 3, 6, 6)).sum().backward()
    assert not both.aggregators[1].torn
    comm.close()


def test_wrong_use(mocks: Path) -> None:
    run_mocked(mocks, 2, _wrong_use)


def _one_dies(rank: int, n: int, update: str) -> tuple[tuple[int, ...], bool]:
    import os
    import signal

    gpu = mocked.install()
    comm = par.init(20.0)
    both = Twice(comm, gpu, update=update)
    both.backward()
    both.step()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    module = both.modules[1]
    with pytest.raises(par.PeerError) as caught:
        module(torch.ones(1, 3, 6, 6)).sum().backward()
    torn = both.aggregators[1].torn
    optimizer, before = both.optimizers[1], module.head.weight.detach().clone()
    optimizer.step()  # by gradients that are worthless
    assert torch.equal(module.head.weight, before)
    both.close()
    comm.close()
    del both
    module.head.weight.grad = gpu.put(torch.ones_like(before))
    optimizer.step()  # by gradients of the user's own
    assert not torch.equal(module.head.weight, before)
    return caught.value.peers, torn


@pytest.mark.parametrize("update", ["step", "eager"])
def test_a_death_is_told_by_name_and_weights_count_as_torn(update: str, mocks: Path) -> None:
    outcomes = outcomes_of(3, _one_dies, update, env=mocked.environment(mocks), deadline_s=40)
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.value == ((1,), True), outcome.trace


def _ddp(rank: int, n: int, hook_name: str, kernels: bool) -> list[torch.Tensor]:
    """Gradients of two iterations; the second finds the buckets that DDP has made after the first."""
    import os

    import torch.distributed as dist

    gpu = mocked.install(everything=True)
    if not kernels:
        _core.Device.has_kernels = property(lambda self: False)  # type: ignore[assignment]
    dist.init_process_group("gloo", rank=rank, world_size=n)
    comm = par.init(30.0)
    torch.manual_seed(0)
    module = nn.parallel.DistributedDataParallel(
        nn.Sequential(nn.Linear(20, 300), nn.ReLU(), nn.Linear(300, 7)), bucket_cap_mb=0.01
    )
    module.register_comm_hook(comm, getattr(par, hook_name))
    for _ in range(2):
        module.zero_grad()
        torch.manual_seed(rank)
        module(torch.randn(8, 20)).square().mean().backward()
    assert gpu.num_settled > 2  # the hook has gone by the device
    reference = copy.deepcopy(module.module)
    reference.zero_grad()
    for r in range(n):
        torch.manual_seed(r)
        (reference(torch.randn(8, 20)).square().mean() / n).backward()
    loose = hook_name != "allreduce_hook"
    for param, other in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(
            param.grad, other.grad, rtol=1e-2 if loose else 1e-5, atol=1e-3 if loose else 1e-6
        )
    grads = [param.grad for param in module.parameters()]
    if rank == n - 1:
        os._exit(0)  # in the middle of training
    loss = module(torch.randn(8, 20)).square().mean()
    with pytest.raises(par.PeerError):
        loss.backward()
    comm.close()
    return grads


@pytest.mark.parametrize(
    ("hook", "kernels"),
    [
        ("allreduce_hook", True),
        ("allreduce_hook", False),
        ("bf16_compress_hook", True),
        ("fp16_compress_hook", True),
    ],
)
def test_ddp_with_the_hook(hook: str, kernels: bool, mocks: Path) -> None:
    outcomes = outcomes_of(3, _ddp, hook, kernels, env=mocked.environment(mocks), deadline_s=60)
    assert outcomes[0].value is not None, outcomes[0].trace
    assert outcomes[1].value is not None, outcomes[1].trace
    for one, other in zip(outcomes[0].value, outcomes[1].value, strict=True):
        assert torch.equal(one, other)
