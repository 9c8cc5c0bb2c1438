"""Collectives of tensors on a GPU, over a mock of NCCL and of the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mocked
import pytest
import torch

import pyallreduce as par
from ranks import outcomes_of, run_ranks


def run_mocked(mocks: Path, n: int, fn: Any, *args: Any, **kwargs: Any) -> list[Any]:
    return run_ranks(n, fn, *args, env=mocked.environment(mocks), **kwargs)


def numbers(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return ((torch.arange(numel) * 7 + rank * 5) % 4 + 1).to(dtype)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGERS = [torch.int64, torch.int32, torch.uint8]


def _all_collectives(rank: int, n: int) -> None:
    gpu = mocked.install()
    comm = par.init(20.0)
    for dtype in DTYPES + INTEGERS:
        for numel in (1, 1000, 0):
            by_rank = [numbers(r, numel, dtype) for r in range(n)]
            total = torch.stack(by_rank).sum(0).to(dtype)
            for asynchronous in (False, True):
                mine = gpu.put(by_rank[rank].clone())
                work = comm.all_reduce(mine, async_op=asynchronous)
                if work is not None:
                    work.wait()
                assert torch.equal(mine, total), (dtype, numel)
            everything = gpu.empty(numel * n, dtype)
            comm.all_gather(everything, gpu.put(by_rank[rank].clone()))
            assert torch.equal(everything, torch.cat(by_rank))
            shard = gpu.empty(numel, dtype)
            comm.reduce_scatter(shard, gpu.put(torch.cat(by_rank)))
            assert torch.equal(shard, by_rank[rank] * n)
            copied = gpu.put(by_rank[rank].clone())
            comm.broadcast(copied, root=n - 1)
            assert torch.equal(copied, by_rank[n - 1])
    for dtype in DTYPES:
        mean = gpu.put(numbers(rank, 1000, dtype))
        comm.all_reduce(mean, op="avg")
        right = torch.stack([numbers(r, 1000, dtype) for r in range(n)]).sum(0).double() / n
        torch.testing.assert_close(mean, right.to(dtype))
    on_host = torch.ones(3)
    comm.all_reduce(on_host)  # in one order with those of the device
    assert on_host.tolist() == [n] * 3
    comm.close()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_collectives_of_device_memory(n: int, mocks: Path) -> None:
    run_mocked(mocks, n, _all_collectives)


def _many_at_once(rank: int, n: int) -> None:
    gpu = mocked.install()
    comm = par.init(20.0)
    tensors = [gpu.put(torch.full((100,), float(rank + i))) for i in range(20)]
    works = [comm.all_reduce(tensor, async_op=True) for tensor in tensors]
    host = torch.ones(5)
    comm.all_reduce(host)
    for i, (work, tensor) in enumerate(zip(works, tensors, strict=True)):
        work.wait()
        assert work.done()
        assert tensor.tolist() == [i * n + n * (n - 1) / 2] * 100
    assert host[0] == n
    comm.close()


def test_asynchronous_ones_keep_their_order_and_their_memory(mocks: Path) -> None:
    run_mocked(mocks, 2, _many_at_once)


def _wrong_use(rank: int, n: int) -> None:
    gpu = mocked.install()
    comm = par.init(20.0)
    with pytest.raises(par.UsageError, match="avg"):
        comm.all_reduce(gpu.put(torch.ones(3, dtype=torch.int32)), op="avg")
    with pytest.raises(par.UsageError, match="op is"):
        comm.all_reduce(gpu.put(torch.ones(3)), op="median")
    works = gpu.put(torch.ones(3))
    comm.all_reduce(works)
    assert works.tolist() == [n] * 3
    comm.close()
    with pytest.raises(par.UsageError, match="closed"):
        comm.all_reduce(works)


def test_wrong_use_is_refused_and_does_no_harm(mocks: Path) -> None:
    run_mocked(mocks, 2, _wrong_use)


def _host_here_device_there(rank: int, n: int) -> str:
    gpu = mocked.install()
    comm = par.init(20.0)
    comm.all_reduce(gpu.put(torch.ones(4)))
    data = torch.ones(4 + (rank == 2))
    with pytest.raises(par.MismatchError) as caught:
        comm.all_reduce(gpu.put(data))
    with pytest.raises(par.MismatchError):  # poisoned, the host's half too
        comm.all_reduce(torch.ones(1))
    return str(caught.value)


def test_a_mismatch_is_found_before_anything_is_launched(mocks: Path) -> None:
    messages = run_mocked(mocks, 3, _host_here_device_there)
    assert all("rank 2" in message for message in messages), messages


def _first_call_differs(rank: int, n: int) -> str:
    gpu = mocked.install()
    comm = par.init(20.0)
    data = torch.ones(4)
    with pytest.raises(par.MismatchError) as caught:
        comm.all_reduce(gpu.put(data) if rank == 0 else data)
    return str(caught.value)


def test_a_device_here_and_a_host_there(mocks: Path) -> None:
    messages = run_mocked(mocks, 2, _first_call_differs)
    assert all("unique id" in message for message in messages), messages


def _one_dies(rank: int, n: int) -> tuple[int, ...]:
    import os
    import signal

    gpu = mocked.install()
    comm = par.init(20.0)
    data = gpu.put(torch.ones(4))
    comm.all_reduce(data)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(par.PeerError) as caught:
        comm.all_reduce(data)
    with pytest.raises(par.PeerError):
        comm.all_reduce(torch.ones(1))
    comm.close()
    return caught.value.peers


def test_a_death_is_told_by_name(mocks: Path) -> None:
    outcomes = outcomes_of(3, _one_dies, env=mocked.environment(mocks), deadline_s=30)
    assert outcomes[1].exitcode == -9
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.value == (1,), outcome.trace


def _one_leaves_while_others_fly(rank: int, n: int) -> bool:
    gpu = mocked.install()
    comm = par.init(20.0)
    data = gpu.put(torch.ones(4))
    works = [comm.all_reduce(data, async_op=True) for _ in range(10)]
    if rank == 0:
        comm.close()  # what is in flight may end, or not; no hang, and no other error than ours
        return True
    try:
        for work in works:
            work.wait()
        comm.all_reduce(data)
    except par.Error as error:
        return error.peers == (0,)
    return False


def test_an_orderly_close_does_not_hang(mocks: Path) -> None:
    assert all(run_mocked(mocks, 3, _one_leaves_while_others_fly))
