"""One row of ``pyallreduce bench``: buffers, timed calls, verified results."""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyallreduce.cli.backends import Backend, gather
from pyallreduce.cli.bench import COLLECTIVES, DATATYPES, Case

CHUNK_ELEMS = 1 << 20  # that are filled or verified at a time; bounds the memory this takes


# --- data whose result is known --------------------------------------------------------------------------------------


def pattern(where: Tensor, rank: int | Tensor, attempt: int, op: str, size: int) -> Tensor:
    """Elements ``where`` of what ``rank`` puts in: whole numbers whose reduction is exact in every datatype.

    Sums stay within 2^8, up to which bfloat16 holds all (of at most 128 ranks); products are powers of 2. They look
    random, so that those of another place, rank or attempt are noticed.
    """
    # A multiplicative hash: its high bits depend on all bits of the argument.
    mixed = (where + rank * 2**40 + attempt * 2**52) * 0x5851F42D4C957F2D
    values = (mixed ^ (mixed >> 29)) * 0x2545F4914F6CDD1D >> 33
    if op == "prod":
        return 1 + values % 2
    return values % (max(2, 256 // size + 1) if op in ("sum", "avg") else 251)


def combine(inputs: Iterable[Tensor], op: str) -> Tensor:
    """What the ranks' inputs are reduced to; ``avg`` is still the sum."""
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "sum": torch.add,
        "avg": torch.add,
        "prod": torch.mul,
        "max": torch.maximum,
        "min": torch.minimum,
    }
    return functools.reduce(functions[op], inputs)


def count_wrong(got: Tensor, want: Tensor, op: str, size: int) -> int:
    """Elements of ``got`` that are not ``want``, a tensor of float64 or int64 as ``combine`` returns it."""
    if op == "avg":  # sum x 1/size or sum / size: they differ by up to a unit in the last place
        want = want / size
        right = (got.double() - want).abs() <= torch.finfo(got.dtype).eps * want.abs()
    else:
        right = got == want.to(got.dtype)
    return int((~right).sum())


# --- one row ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One half of a row: out-of-place or in-place."""

    time_s: float
    algbw: float  # GB/s
    busbw: float | None  # None for one rank, which has no bus
    wrong: int | None  # None if nothing was verified
    samples_s: list[float]  # with -I: of each call, that of its slowest rank

    def spread(self) -> dict[str, float]:
        """In the order of nccl-tests' columns."""
        ordered = sorted(self.samples_s)
        return {
            "min_us": 1e6 * ordered[0],
            "max_us": 1e6 * ordered[-1],
            "p99_us": 1e6 * ordered[-1 - len(ordered) // 100],
            "cv_pct": 100 * statistics.pstdev(ordered) / statistics.fmean(ordered),
        }


@dataclass(frozen=True)
class Buffers:
    """Of one row. The same tensor twice, if the collective works in place."""

    input: Tensor
    output: Tensor


class Bench:
    """Memory for the largest row, and what is done with it. Collective, every method."""

    def __init__(self, options: argparse.Namespace, backend: Backend) -> None:
        self._options, self._backend = options, backend
        self._collective = COLLECTIVES[options.collective]
        self._attempt = 0  # of verifying; makes the data of each differ
        # One for each of out-of-place and in-place: all shards together, and a single shard.
        self._memory = {
            symmetric: (
                backend.empty(options.maxbytes, symmetric),
                backend.empty(options.maxbytes // backend.size, symmetric),
            )
            for symmetric in ([False, True] if backend.symmetric else [False])
        }

    def count(self, case: Case, nbytes: int) -> int:
        """Elements per rank, as nccl-tests has it: of a shard, if there are shards."""
        return nbytes // itemsize(case) // self._num_shards

    def nbytes(self, case: Case, count: int) -> int:
        """The size from which bandwidths are computed: that of all shards."""
        return count * self._num_shards * itemsize(case)

    def result(self, case: Case, count: int, symmetric: bool) -> Result:
        options, backend = self._options, self._backend
        buffers = self._buffers(case, count, symmetric)
        call = self._call(case, buffers)
        self._fill(case, buffers.input)
        for _ in range(options.warmup_iters):
            call()
        backend.barrier()
        # In place, sums of sums grow beyond all bounds, as in nccl-tests; infinity takes no longer than a number.
        samples_s = timed(call, options.iters, bool(options.per_iter_timing))
        rank_samples_s = gather(backend, torch.tensor(samples_s, dtype=torch.float64))
        times_s = rank_samples_s.mean(1)
        time_s = [times_s[0], times_s.mean(), times_s.min(), times_s.max()][options.average].item()
        algbw = self.nbytes(case, count) / time_s / 1e9
        factor = self._collective.bus_factor(backend.size)
        return Result(
            time_s=time_s,
            algbw=algbw,
            busbw=algbw * factor if backend.size > 1 else None,
            wrong=self._count_wrong(case, buffers, call) if options.check else None,
            samples_s=rank_samples_s.amax(0).tolist(),
        )

    @property
    def _num_shards(self) -> int:
        return self._backend.size if self._collective.by_shard else 1

    def _buffers(self, case: Case, count: int, symmetric: bool) -> Buffers:
        dtype = torch_dtype(case)
        together, single = self._memory[symmetric]
        full = together[: self.nbytes(case, count)].view(dtype)
        if not self._collective.by_shard:
            return Buffers(full, full)
        shard = single[: count * dtype.itemsize].view(dtype)
        if self._collective.reduces:
            return Buffers(full, shard)
        return Buffers(shard, full)

    def _call(self, case: Case, buffers: Buffers) -> Callable[[], object]:
        backend, input, output = self._backend, buffers.input, buffers.output
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: backend.all_reduce(output, case.op),
            "reduce_scatter": lambda: backend.reduce_scatter(output, input, case.op),
            "all_gather": lambda: backend.all_gather(output, input),
            "broadcast": lambda: backend.broadcast(output, case.root),
        }
        return calls[self._collective.name]

    def _count_wrong(self, case: Case, buffers: Buffers, call: Callable[[], object]) -> int:
        """Wrong elements over all ranks and ``check`` calls."""
        wrong = 0
        for _ in range(self._options.check):
            self._attempt += 1
            self._fill(case, buffers.input)
            call()
            for where in chunks(buffers.output.numel()):
                got = buffers.output[where[0] : where[-1] + 1]
                want = self._expected(case, where, buffers.output.numel())
                wrong += count_wrong(got, want, case.op, self._backend.size)
        return int(gather(self._backend, torch.tensor([wrong])).sum())

    def _fill(self, case: Case, data: Tensor) -> None:
        for where in chunks(data.numel()):
            data[where[0] : where[-1] + 1] = self._input(case, where, self._backend.rank)

    def _input(self, case: Case, where: Tensor, rank: int | Tensor) -> Tensor:
        return pattern(where, rank, self._attempt, case.op, self._backend.size)

    def _expected(self, case: Case, where: Tensor, numel: int) -> Tensor:
        """Elements ``where`` of this rank's output, which has ``numel``; averages as sums."""
        if self._collective.has_root:
            return self._input(case, where, case.root)
        if not self._collective.reduces:
            shard = numel // self._backend.size
            return self._input(case, where % shard, where // shard)
        if self._collective.by_shard:
            where = where + self._backend.rank * numel
        wide = torch.float64 if torch_dtype(case).is_floating_point else torch.int64
        ranks = range(self._backend.size)
        return combine((self._input(case, where, rank).to(wide) for rank in ranks), case.op)


def torch_dtype(case: Case) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, DATATYPES[case.datatype])
    return dtype


def itemsize(case: Case) -> int:
    return torch_dtype(case).itemsize


def chunks(numel: int) -> Iterator[Tensor]:
    """The numbers from 0 to numel - 1, some at a time."""
    for begin in range(0, numel, CHUNK_ELEMS):
        yield torch.arange(begin, min(begin + CHUNK_ELEMS, numel))


def timed(call: Callable[[], object], iters: int, each: bool) -> list[float]:
    """Seconds of every call, at the price of a look at the clock each; or without ``each`` only their mean."""
    clock = time.perf_counter
    if not each:
        begin = clock()
        for _ in range(iters):
            call()
        return [(clock() - begin) / iters]
    times = [clock()]
    for _ in range(iters):
        call()
        times.append(clock())
    return [end - begin for begin, end in itertools.pairwise(times)]
