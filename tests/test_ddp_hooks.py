"""DistributedDataParallel with our hooks against stock DDP over Gloo."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pyallreduce as par
from ranks import outcomes_of, run_ranks

STEPS = 20
SMALL_BUCKETS_MB = 0.0005  # several per model, once DDP has rebuilt them after the first iteration

Hook = Callable[[par.Communicator, dist.GradBucket], Any]


class Net(nn.Module):
    """`side` is used only by forwards that ask for it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 6)
        )
        self.side = nn.Linear(6, 6)

    def forward(self, x: Tensor, with_side: bool = True) -> Tensor:
        h = self.body(x)
        return h + self.side(h) if with_side else h


def batch(rank: int, t: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * t + rank)
    return torch.randn(8, 6, generator=generator, dtype=torch.float64).to(dtype)


def train(
    rank: int,
    dtype: torch.dtype,
    comm: par.Communicator | None,
    hook: Hook | None = None,
    accumulate: bool = False,
    **options: Any,
) -> tuple[Tensor, int]:
    """Weights after STEPS iterations, and the largest number of buckets in one; stock DDP without ``comm``."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    ddp = DistributedDataParallel(model, **options)
    buckets: list[int] = []
    if comm is not None:
        ddp.register_comm_hook(comm, counting(hook or par.allreduce_hook, buckets))
    # par.SGD rounds in another order than torch's; one optimizer for both leaves the sums to compare.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    find_unused = options.get("find_unused_parameters", False)
    for t in range(STEPS):
        with_side = not find_unused or (t + rank) % 3 != 0
        if accumulate:
            with ddp.no_sync():
                ddp(batch(rank, t + 100, dtype), with_side).square().mean().backward()
        ddp(batch(rank, t, dtype), with_side).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), max(buckets, default=0)


def counting(hook: Hook, indices: list[int]) -> Hook:
    def wrapped(state, bucket):  # DDP does not understand postponed annotations
        indices.append(bucket.index() + 1)
        return hook(state, bucket)

    return wrapped


def process_group(rank: int, size: int) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": SMALL_BUCKETS_MB},
    "small bucket views": {
        "bucket_cap_mb": SMALL_BUCKETS_MB,
        "gradient_as_bucket_view": True,
    },
    "unused": {"find_unused_parameters": True, "bucket_cap_mb": SMALL_BUCKETS_MB},
    "unused, views": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    "no_sync": {"accumulate": True},
    "no_sync, views": {
        "accumulate": True,
        "gradient_as_bucket_view": True,
        "bucket_cap_mb": SMALL_BUCKETS_MB,
    },
}


def all_variants(rank: int, size: int, dtype: torch.dtype, init_first: bool) -> dict[str, Any]:
    comm = None
    if init_first:
        comm = par.init()
        process_group(rank, size)
    else:
        process_group(rank, size)
        comm = par.init()
    results = {
        name: (train(rank, dtype, None, **options)[0], *train(rank, dtype, comm, **options))
        for name, options in VARIANTS.items()
    }
    comm.close()
    dist.destroy_process_group()
    return results


@pytest.mark.parametrize(
    ("size", "dtype", "rtol", "init_first"),
    [
        (2, torch.float32, 1e-6, True),
        (3, torch.float64, 1e-9, False),
        (4, torch.float64, 1e-9, True),
    ],
)
def test_equals_stock_ddp(size: int, dtype: torch.dtype, rtol: float, init_first: bool) -> None:
    results = run_ranks(size, all_variants, dtype, init_first, deadline_s=100)
    for name, options in VARIANTS.items():
        for by_variant in results:
            stock, ours, num_buckets = by_variant[name]
            assert torch.equal(ours, results[0][name][1]), name
            scale = stock.abs().max().item()
            torch.testing.assert_close(ours, stock, rtol=rtol, atol=rtol * scale, msg=name)
            assert (num_buckets > 2) == ("bucket_cap_mb" in options), name
        assert not torch.equal(results[0]["plain"][1], results[0]["no_sync"][1])


# --- compression ---------------------------------------------------------------------------------

COMPRESSED = {
    torch.bfloat16: (par.bf16_compress_hook, 2.0**-8),
    torch.float16: (par.fp16_compress_hook, 2.0**-11),
}


class Slopes(nn.Module):
    """A gradient of our choice: that of sum(slopes * w)."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(numel))

    def forward(self, slopes: Tensor) -> Tensor:
        return (slopes * self.w).sum()


def gradient_by(comm: par.Communicator, hook: Hook, slopes: Tensor, **options: Any) -> Tensor:
    ddp = DistributedDataParallel(Slopes(slopes.numel()), **options)
    ddp.register_comm_hook(comm, hook)
    ddp(slopes).backward()
    return ddp.module.w.grad


def compression(rank: int, size: int) -> None:
    process_group(rank, size)
    comm = par.init()
    for dtype, (hook, unit) in COMPRESSED.items():
        for views in (False, True):
            slopes = [batch(r, 0, torch.float64).flatten() for r in range(size)]
            exact = sum(slopes) / size
            got = gradient_by(comm, hook, slopes[rank].float(), gradient_as_bucket_view=views)
            # Each rank's gradient is rounded once on the way, the average once.
            bound = unit * (sum(s.abs() for s in slopes) / size + exact.abs()) * 1.01
            assert got.dtype == torch.float32
            assert ((got.double() - exact).abs() <= bound).all()
            assert torch.equal(got.to(dtype).float(), got)  # it has been through the narrow type
        # 256 + 1 + 1 (2048 + 1 + 1): each addition on its own would round a one away.
        large = 1 / unit
        mine = torch.tensor([large if rank == 0 else 1.0, 3.0])
        want = ((torch.tensor(large + size - 1) / size).to(dtype).float()).item()
        assert gradient_by(comm, hook, mine).tolist() == [want, 3.0]
        # An average whose sum overflows float16.
        top = torch.full((5,), 60000.0).to(dtype).float()
        assert torch.equal(gradient_by(comm, hook, top), top)
        weights = train(rank, torch.float32, comm, hook)[0]
        stock = train(rank, torch.float32, None)[0]
        assert not torch.equal(weights, stock)
        assert (weights - stock).norm() <= 16 * unit * stock.norm()
        gathered = torch.empty(size * weights.numel())
        comm.all_gather(gathered, weights)
        assert (gathered.view(size, -1) == weights).all()
    overflow = gradient_by(comm, par.fp16_compress_hook, torch.full((3,), 1e5))
    assert overflow.isinf().all()
    comm.close()
    dist.destroy_process_group()


def test_compressed_sums_are_rounded_once() -> None:
    run_ranks(3, compression)


# --- errors, warnings, pickles -------------------------------------------------------------------


def die(rank: int, size: int, hook_name: str, in_hook: bool) -> tuple[int, ...]:
    process_group(rank, size)
    comm = par.init(timeout_s=20)
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Net(), bucket_cap_mb=SMALL_BUCKETS_MB)
    ddp.register_comm_hook(comm, getattr(par, hook_name))
    for t in range(2):
        ddp(batch(rank, t, torch.float32)).sum().backward()
    if rank == 1:
        victim = ddp.module.body[0 if in_hook else 4].weight
        victim.register_hook(lambda grad: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(par.PeerError) as caught:
        ddp(batch(rank, 2, torch.float32)).sum().backward()
    with pytest.raises(par.PeerError):  # the first cause, again
        comm.barrier()
    return caught.value.peers


@pytest.mark.parametrize(
    ("hook_name", "in_hook"), [("allreduce_hook", False), ("bf16_compress_hook", True)]
)
def test_backward_raises_the_error_of_the_collective(hook_name: str, in_hook: bool) -> None:
    outcomes = outcomes_of(3, die, hook_name, in_hook)
    assert outcomes[1].exitcode == -signal.SIGKILL
    for rank in (0, 2):
        assert outcomes[rank].error is None, outcomes[rank].trace
        assert outcomes[rank].value == (1,)


def usage(rank: int, size: int) -> None:
    process_group(rank, size)
    store = dist.distributed_c10d._get_default_store()

    def ddp_with(state: Any, hook: Hook = par.allreduce_hook, **options: Any) -> Any:
        torch.manual_seed(0)
        ddp = DistributedDataParallel(Net(), **options)
        ddp.register_comm_hook(state, hook)
        return ddp

    def backward(ddp: nn.Module) -> None:
        ddp(batch(rank, 0, torch.float32)).sum().backward()

    # A communicator over other ranks than DDP's.
    alone = par.init(store=dist.PrefixStore(f"alone{rank}", store), rank=0, size=1)
    for hook in (par.allreduce_hook, par.bf16_compress_hook):
        for _ in range(2):  # not only the first time
            with pytest.raises(par.UsageError, match="process group"):
                backward(ddp_with(alone, hook))
    reversed_ranks = par.init(
        store=dist.PrefixStore("reversed", store), rank=size - 1 - rank, size=size
    )
    if rank != size - 1 - rank:
        with pytest.raises(par.UsageError, match="process group"):
            backward(ddp_with(reversed_ranks))

    # DDP with static_graph is warned of; without, nothing is said.
    comm = par.init()
    with pytest.warns(UserWarning, match="static_graph"):
        backward(ddp_with(comm, static_graph=True))
    quiet = par.init(store=dist.PrefixStore("quiet", store), rank=rank, size=size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(ddp_with(quiet))
    quiet.close()

    # The hook's state travels with the module, unattached.
    ddp = ddp_with(comm)
    backward(ddp)
    stream = io.BytesIO()
    torch.save(ddp, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    for mine, theirs in zip(loaded.parameters(), ddp.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    ((hook, state),) = loaded._comm_hooks
    assert hook is par.allreduce_hook
    assert (state.rank, state.size) == (rank, size)
    assert "unattached" in repr(state)
    calls: list[Callable[[], Any]] = [
        state.barrier,
        lambda: state.all_reduce(torch.ones(1)),
        lambda: state.broadcast(torch.ones(1)),
        lambda: state.symmetric_empty(1),
        lambda: par.GradientAggregator(nn.Linear(1, 1), state),
    ]
    for call in calls:
        with pytest.raises(par.UsageError, match="pickle"):
            call()
    state.close()
    # Trains on with a live communicator, and not with the dead one.
    again = DistributedDataParallel(loaded.module)
    again.register_comm_hook(state, par.allreduce_hook)
    with pytest.raises(par.UsageError, match="pickle"):
        backward(again)
    again = DistributedDataParallel(loaded.module)
    again.register_comm_hook(comm, par.allreduce_hook)
    backward(again)

    comm.close()
    with pytest.raises(par.UsageError, match="closed"):
        backward(ddp)
    dist.destroy_process_group()


def test_usage_errors_warnings_and_pickles() -> None:
    run_ranks(2, usage)


def mismatch(rank: int, size: int) -> tuple[int, ...]:
    process_group(rank, size)
    comm = par.init()
    hook = par.bf16_compress_hook if rank == 2 else par.allreduce_hook
    ddp = DistributedDataParallel(Net())
    ddp.register_comm_hook(comm, hook)
    with pytest.raises(par.MismatchError) as caught:
        ddp(batch(rank, 0, torch.float32)).sum().backward()
    return caught.value.peers


def test_ranks_with_different_hooks_are_a_mismatch() -> None:
    assert run_ranks(3, mismatch) == [(2,)] * 3


def communicators_come_and_go(rank: int, size: int) -> None:
    """Over a subgroup, one after the other in one process, and with an unused DDP lying about."""
    process_group(rank, size)
    group = dist.new_group([0, 1])
    store = dist.distributed_c10d._get_default_store()
    if rank < 2:
        with contextlib.ExitStack() as stack:
            for i in range(3):
                comm = par.init(store=dist.PrefixStore(f"pair{i}", store), rank=rank, size=2)
                stack.callback(comm.close)
                torch.manual_seed(0)
                ddp = DistributedDataParallel(Net(), process_group=group)
                ddp.register_comm_hook(comm, par.allreduce_hook)
                ddp(batch(rank, i, torch.float32)).sum().backward()
                grad = ddp.module.side.weight.grad.clone()
                comm.all_reduce(grad, "avg")
                assert torch.equal(grad, ddp.module.side.weight.grad)
    dist.barrier()
    dist.destroy_process_group()


def test_subgroups_and_several_communicators() -> None:
    run_ranks(3, communicators_come_and_go)


def uneven_inputs(rank: int, size: int) -> None:
    """Under Join the hook also runs on ranks that have finished, outside of backward."""
    process_group(rank, size)
    comm = par.init()
    weights = []
    for hooked in (False, True):
        torch.manual_seed(0)
        ddp = DistributedDataParallel(Net().double(), bucket_cap_mb=SMALL_BUCKETS_MB)
        if hooked:
            ddp.register_comm_hook(comm, par.allreduce_hook)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        with ddp.join():
            for t in range(2 + 2 * rank):
                optimizer.zero_grad()
                ddp(batch(rank, t, torch.float64)).square().mean().backward()
                optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in ddp.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-9, atol=1e-12)
    comm.close()
    dist.destroy_process_group()


def test_join() -> None:
    run_ranks(2, uneven_inputs)
