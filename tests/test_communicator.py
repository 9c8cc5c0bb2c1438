"""The contract of every collective on the ranks of one host: exact values, all types, sizes and counts."""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import pyallreduce as par
from ranks import run_ranks

SIZES = [1, 2, 3, 4, 5, 8]  # ranks outnumber the cores
DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
]
OPS = ["sum", "avg", "prod", "min", "max"]
COMBINE = {
    "sum": operator.add,
    "avg": operator.add,
    "prod": operator.mul,
    "min": torch.minimum,
    "max": torch.maximum,
}


def counts(n: int) -> list[int]:
    return sorted({0, 1, n - 1, n, n + 1, 65_537, 1_000_003})


@functools.lru_cache(maxsize=16)
def whole_numbers(rank: int, numel: int, op: str) -> torch.Tensor:
    """Small: sums of 8 stay exact in bfloat16, products of 8 in uint8."""
    i = torch.arange(numel)
    if op == "prod":
        return ((i + rank) % 4 == 0).to(torch.int64) + 1
    return (i * 7 + rank * 3) % 11


def values(rank: int, numel: int, dtype: torch.dtype, op: str) -> torch.Tensor:
    return whole_numbers(rank, numel, op).to(dtype, copy=True)


@functools.lru_cache(maxsize=8)
def combined(n: int, numel: int, op: str) -> torch.Tensor:
    """Exact, because int64 holds every intermediate value."""
    return functools.reduce(COMBINE[op], (whole_numbers(r, numel, op) for r in range(n)))


def expected(n: int, numel: int, dtype: torch.dtype, op: str) -> torch.Tensor:
    exact = combined(n, numel, "sum" if op == "avg" else op)
    if op == "avg":  # one multiplication by 1/n in the accumulator, one rounding
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (exact.to(wide) * torch.tensor(1.0 / n, dtype=wide)).to(dtype)
    return exact.to(dtype)


def combinations() -> list[tuple[torch.dtype, str]]:
    return [(d, o) for d, o in itertools.product(DTYPES, OPS) if d.is_floating_point or o != "avg"]


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def all_reduce_everything(rank: int, n: int) -> None:
    comm = par.init()
    for numel in counts(n):
        for dtype, op in combinations():
            want = expected(n, numel, dtype, op)
            plain = values(rank, numel, dtype, op)
            comm.all_reduce(plain, op)
            assert torch.equal(plain, want), (numel, dtype, op, "plain")
            if numel > 65_537 and dtype not in (torch.float32, torch.bfloat16):
                continue  # a second path over large counts for two types is enough
            symmetric = comm.symmetric_empty(numel, dtype).copy_(values(rank, numel, dtype, op))
            work = comm.all_reduce(symmetric, op, async_op=True)
            work.wait()
            assert work.done()
            assert torch.equal(symmetric, want), (numel, dtype, op, "symmetric")
    comm.close()


@pytest.mark.parametrize("n", SIZES)
def test_all_reduce(n: int) -> None:
    run_ranks(n, all_reduce_everything, deadline_s=100)


# --- staging: plain tensors go through slots that are used again and again ---


def bytes_in_the_core(constant: str) -> int:
    rooms = Path(__file__).parents[1] / "csrc/group"
    text = "".join(path.read_text() for path in rooms.glob("shared_memory*"))
    (found,) = re.findall(rf"{constant} = size_t\{{(\d+)\}} << (\d+);", text)
    return int(found[0]) << int(found[1])


def staged_counts(n: int, itemsize: int) -> list[int]:
    """Around every boundary: of the path, of a rank's area in a slot, of a chunk, of a shorter last chunk."""
    area = bytes_in_the_core("kTurnBytes") // n // 64 * 64
    chunk = n * area
    boundaries = [bytes_in_the_core(f"kOnePhase{which}Bytes") for which in ("Symmetric", "")]
    boundaries += [
        area,
        chunk,
        chunk + area,
        chunk + (n - 1) * area,
        2 * chunk,
        2 * chunk + area // 2,
        3 * chunk,
    ]
    return sorted({b // itemsize + d for b in boundaries for d in (-1, 0, 1)})


@functools.cache
def random_digits() -> torch.Tensor:
    """Sums of 8 fit every dtype exactly."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(16, (3 << 20,), dtype=torch.uint8, generator=generator)


def digits(rank: int, call: int, numel: int) -> torch.Tensor:
    """Other ones for every rank, call and place: what lies where it should not is seen."""
    begin = (rank * 104_729 + call * 7_919) % (random_digits().numel() - numel)
    return random_digits()[begin : begin + numel]


# Of a tensor: ordinary memory; symmetric memory at the same offset everywhere, or at another on each rank; or one
# kind on some ranks, the other on the rest. All but "same" are staged.
PLACES = ["ordinary", "same", "ordinary", "elsewhere", "mixed"]


class Staging:
    """Calls with fresh values, whose results are checked exactly."""

    def __init__(self, rank: int, n: int) -> None:
        self.rank, self.n, self.call = rank, n, 0
        self.comm = par.init()
        self.symmetric = self.comm.symmetric_empty(2 << 20, torch.uint8)
        self.pending: list[tuple[Any, torch.Tensor, torch.Tensor, str]] = []

    def of_all(self, numel: int) -> list[torch.Tensor]:
        return [digits(r, self.call, numel) for r in range(self.n)]

    def put(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        if place == "ordinary" or (place == "mixed" and self.rank % 2):
            return tensor.clone()
        self.check()  # what is on its way may use the same memory
        begin = 64 * self.rank if place == "elsewhere" else 0
        part = self.symmetric[begin : begin + tensor.nbytes].view(tensor.dtype)
        return part.copy_(tensor)

    def all_reduce(
        self, numel: int, dtype: torch.dtype, op: str = "sum", place: str = "ordinary"
    ) -> None:
        self.call += 1
        want = functools.reduce(COMBINE[op], self.of_all(numel)).to(dtype)
        tensor = self.put(digits(self.rank, self.call, numel).to(dtype), place)
        if self.rank == self.call % self.n:
            time.sleep(0.0005)  # the others sleep by then, and wake up behind this one
        work = self.comm.all_reduce(tensor, op, async_op=self.call % 3 == 0)
        self.pending.append((work, tensor, want, f"{numel} {dtype} {op} {place}"))
        if work is None:
            self.check()

    def check(self) -> None:
        for work, tensor, want, what in self.pending:
            if work is not None:
                work.wait()
            assert torch.equal(tensor, want), what
        self.pending = []

    def other(self, numel: int) -> None:
        """A call that moves the turns on by another number; none in every fourth."""
        self.call += 1
        n, rank, comm, kind = self.n, self.rank, self.comm, self.call // 2 % 4
        everyones = self.of_all(numel)
        if kind == 1:
            root = self.call % n
            sent = everyones[rank].clone()
            comm.broadcast(sent, root)
            assert torch.equal(sent, everyones[root])
        elif kind == 2:
            gathered = torch.empty(n * numel, dtype=torch.uint8)
            comm.all_gather(gathered, everyones[rank].clone())
            assert torch.equal(gathered, torch.cat(everyones))
        elif kind == 3:
            shard = torch.empty(numel // n, dtype=torch.uint8)
            whole = numel // n * n
            comm.reduce_scatter(shard, everyones[rank][:whole].clone())
            total = sum(everyones, torch.zeros(numel, dtype=torch.uint8))
            assert torch.equal(shard, total[:whole].view(n, -1)[rank])


def staged_all_reduces(rank: int, n: int) -> None:
    staging = Staging(rank, n)
    places = itertools.cycle(PLACES)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.uint8):
        counts = staged_counts(n, dtype.itemsize)
        for numel, lengths in zip(counts, itertools.cycle([1_000, 20_000, 700_000])):
            staging.other(lengths)
            staging.all_reduce(numel, dtype, "max" if numel % 3 == 0 else "sum", next(places))
        for numel in counts[::-1]:
            staging.all_reduce(numel, dtype)
        staging.check()
    staging.comm.close()


@pytest.mark.parametrize("n", range(1, 9))
def test_staged_all_reduce_around_every_boundary(n: int) -> None:
    run_ranks(n, staged_all_reduces)


# --- the two-buffer collectives ---


def gather_and_scatter_everything(rank: int, n: int) -> None:
    comm = par.init()
    for numel in counts(n):
        if numel > 65_537:
            numel = 300_007  # larger than a staging slot, times n
        for dtype, op in combinations():
            whole = values(rank, n * numel, dtype, op)
            shard = torch.empty(numel, dtype=dtype)
            comm.reduce_scatter(shard, whole, op)
            want = expected(n, n * numel, dtype, op)[rank * numel : (rank + 1) * numel]
            assert torch.equal(shard, want), (numel, dtype, op, "reduce_scatter")
        for dtype in DTYPES:
            gathered = torch.empty(n * numel, dtype=dtype)
            comm.all_gather(gathered, values(rank, numel, dtype, "sum"))
            want = torch.cat([values(r, numel, dtype, "sum") for r in range(n)])
            assert torch.equal(gathered, want), (numel, dtype, "all_gather")
            root = numel % n
            sent = values(rank, numel, dtype, "sum")
            comm.broadcast(sent, root)
            assert torch.equal(sent, values(root, numel, dtype, "sum")), (numel, dtype, "broadcast")
    comm.close()


@pytest.mark.parametrize("n", SIZES)
def test_reduce_scatter_all_gather_broadcast(n: int) -> None:
    run_ranks(n, gather_and_scatter_everything, deadline_s=100)


def symmetric_two_buffer_calls(rank: int, n: int) -> None:
    comm = par.init()
    numel = 40_001
    source = comm.symmetric_empty(n * numel).copy_(values(rank, n * numel, torch.float32, "sum"))
    shard = torch.empty(numel)
    comm.reduce_scatter(shard, source)
    want = expected(n, n * numel, torch.float32, "sum")
    assert torch.equal(shard, want[rank * numel : (rank + 1) * numel])
    comm.all_gather(source, shard)
    assert torch.equal(source, want)
    # Slices at equal offsets are used in place; at unequal offsets they are staged, with the same result.
    for offset in (64, 64 + 16 * rank):
        source.copy_(values(rank, n * numel, torch.float32, "sum"))
        part = source[offset : offset + 30_000]
        plain = part.clone()
        comm.all_reduce(part)
        comm.all_reduce(plain)
        assert torch.equal(part, plain)
    # One rank's tensor is symmetric, the others' are not.
    mixed = source[:30_000] if rank == 0 else torch.empty(30_000)
    mixed.copy_(values(rank, 30_000, torch.float32, "sum"))
    comm.all_reduce(mixed)
    assert torch.equal(mixed, expected(n, 30_000, torch.float32, "sum"))
    survivor = comm.symmetric_empty(1000).fill_(rank)
    comm.close()
    assert (survivor == rank).all()  # the memory outlives the communicator
    survivor += 1


@pytest.mark.parametrize("n", [1, 2, 5])
def test_symmetric_memory(n: int) -> None:
    run_ranks(n, symmetric_two_buffer_calls)


def random_bits(rank: int, n: int) -> list[str]:
    comm = par.init()
    generator = torch.Generator().manual_seed(rank)
    digests = []
    for numel, dtype in itertools.product(
        [3, 1000, 200_003, 700_001], [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    ):
        data = torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype)
        by_path = []
        for tensor in (data.clone(), comm.symmetric_empty(numel, dtype).copy_(data)):
            comm.all_reduce(tensor, "avg")
            by_path.append(digest(tensor))
        scattered = torch.empty(numel, dtype=dtype)
        padded = data.repeat(n)
        comm.reduce_scatter(scattered, padded, "avg")
        assert len({*by_path, digest(scattered)}) == 1, "bits depend on the path"
        digests.append(by_path[0])
    comm.close()
    return digests


@pytest.mark.parametrize("n", [2, 3, 8])
def test_same_bits_on_all_ranks_on_all_paths_in_all_runs(n: int) -> None:
    first, second = run_ranks(n, random_bits), run_ranks(n, random_bits)
    assert all(d == first[0] for d in first + second)


def isa_bits(rank: int, n: int) -> list[str]:
    comm = par.init()
    data = torch.randn(100_003, generator=torch.Generator().manual_seed(rank))
    data[::1000] = float("nan")
    digests = []
    for op, dtype in itertools.product(OPS, [torch.float32, torch.bfloat16, torch.float16]):
        tensor = data.to(dtype)
        comm.all_reduce(tensor, op)
        digests.append(digest(tensor))
    comm.close()
    return digests


def test_same_bits_with_every_instruction_set() -> None:
    isas = par._core.kernels.isas()
    assert "baseline" in isas
    results = [run_ranks(2, isa_bits, env={"PYALLREDUCE_ISA": isa})[0] for isa in isas]
    assert all(r == results[0] for r in results)


def rounding_and_nan(rank: int, n: int) -> None:
    comm = par.init()
    # 256 + 1 + 1: rounding after each addition would lose both ones in bfloat16.
    t = torch.tensor([256.0 if rank == 0 else 1.0], dtype=torch.bfloat16)
    comm.all_reduce(t)
    assert t.item() == 258.0
    # An average that overflows float16 as a sum.
    t = torch.full((5,), 60000.0, dtype=torch.float16)
    comm.all_reduce(t, "avg")
    assert (t == 60000.0).all()
    t = torch.tensor([float("nan") if rank == 1 else 1.0, 2.0])
    for op in ("min", "max"):
        u = t.clone()
        comm.all_reduce(u, op)
        assert u[0].isnan()
        assert u[1] == 2
    t = torch.tensor([2**31 - 1], dtype=torch.int32)
    comm.all_reduce(t)
    assert t.item() == (3 * (2**31 - 1) + 2**31) % 2**32 - 2**31  # wraps
    comm.close()


def test_rounds_once_propagates_nan_and_wraps() -> None:
    run_ranks(3, rounding_and_nan)


def memory_formats(rank: int, n: int) -> None:
    comm = par.init()
    shape = (2, 3, 5, 7)
    t = values(rank, 210, torch.float32, "sum").reshape(shape)
    t = t.to(memory_format=torch.channels_last)
    comm.all_reduce(t)
    assert torch.equal(t, expected(n, 210, torch.float32, "sum").reshape(shape))
    t = values(rank, 35, torch.float32, "sum").reshape(5, 7).t()
    comm.broadcast(t, 1)
    assert torch.equal(t, values(1, 35, torch.float32, "sum").reshape(5, 7).t())
    saved = torch.ones(3, requires_grad=True)
    squared = saved.clone()
    loss = (squared * squared).sum()
    comm.all_reduce(squared.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    comm.close()


def test_memory_formats_and_version_counters() -> None:
    run_ranks(2, memory_formats)


def many_async(rank: int, n: int) -> None:
    comm = par.init()
    tensors = [values(rank, 50 + 997 * i, torch.float32, "sum") for i in range(60)]
    works: list[Any] = []
    for i, tensor in enumerate(tensors):
        if i % 7 == 3:
            comm.all_reduce(tensor)  # keeps its place in the order
        else:
            works.append(comm.all_reduce(tensor, async_op=True))
    for work in works:
        work.wait()
        work.wait()
    for tensor in tensors:
        assert torch.equal(tensor, expected(n, tensor.numel(), torch.float32, "sum"))
    comm.barrier()
    comm.close()


def let_go(rank: int, n: int) -> None:
    comm = par.init()
    for i in range(50):  # nobody holds tensor or Work: the communicator must
        comm.all_reduce(torch.full((300_000,), float(rank + i)), async_op=True)
        comm.all_reduce(comm.symmetric_empty(300_000).fill_(i), async_op=True)
    comm.barrier()
    comm.close()


def test_asynchronous_calls_keep_their_memory_alive() -> None:
    run_ranks(3, let_go)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_asynchronous_calls_keep_their_order(n: int) -> None:
    run_ranks(n, many_async)


def more_than_2_31_elements(rank: int, n: int) -> None:
    comm = par.init(timeout_s=100)
    numel = 2**31 + 5
    t = comm.symmetric_empty(numel, torch.uint8)
    t[-5:] = rank + 1
    t[:5] = 10
    comm.all_reduce(t)
    assert t[-5:].tolist() == [3] * 5
    assert t[:5].tolist() == [20] * 5
    comm.close()


def test_more_than_2_31_elements() -> None:
    run_ranks(2, more_than_2_31_elements, deadline_s=100)


def crowded_calls(rank: int, n: int) -> None:
    comm = par.init()
    everywhere = os.sched_getaffinity(0)
    for mine in 20 * [{min(everywhere)}, everywhere]:  # all on one core, so that they then spread
        os.sched_setaffinity(0, mine)
        for _ in range(50):
            comm.barrier()
        assert os.sched_getaffinity(0) == mine
    comm.close()


def test_ranks_that_outnumber_the_cores_stay_where_their_user_allows_them() -> None:
    run_ranks(len(os.sched_getaffinity(0)) + 2, crowded_calls)
