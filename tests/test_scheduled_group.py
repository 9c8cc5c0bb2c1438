"""Collectives over messages: threads as ranks, every schedule, exact answers."""

import functools
import math
import threading
import time

import numpy as np
import pytest
import torch

import pyallreduce as par
from pyallreduce._core import inproc

SCHEDULES = par.schedules.names()
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGERS = [torch.int64, torch.int32, torch.uint8]
OPS = ["sum", "avg", "prod", "min", "max"]


@pytest.fixture(autouse=True, scope="module")
def _torch_on_one_thread():
    """Else every rank, a thread, brings a pool of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Group:
    """Tensors for the core's addresses."""

    def __init__(self, group, rank, size):
        self._group, self.rank, self.size = group, rank, size

    def all_reduce(self, tensor, op="sum", timeout_s=20.0):
        self._group.all_reduce(tensor.data_ptr(), tensor.numel(), name(tensor), op, timeout_s)
        return tensor

    def reduce_scatter(self, output, tensor, op="sum", timeout_s=20.0):
        assert tensor.numel() == self.size * output.numel()
        addresses = (output.data_ptr(), tensor.data_ptr())
        self._group.reduce_scatter(*addresses, output.numel(), name(output), op, timeout_s)
        return output

    def all_gather(self, output, tensor, timeout_s=20.0):
        assert output.numel() == self.size * tensor.numel()
        addresses = (output.data_ptr(), tensor.data_ptr())
        self._group.all_gather(*addresses, tensor.numel(), name(tensor), timeout_s)
        return output

    def broadcast(self, tensor, root=0, timeout_s=20.0):
        self._group.broadcast(tensor.data_ptr(), tensor.numel(), name(tensor), root, timeout_s)
        return tensor

    def barrier(self, timeout_s=20.0):
        self._group.barrier(timeout_s)


def name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def outcomes_of(size, schedule, body, within_s=60.0):
    """What body(group) returned or raised on each rank."""
    world = inproc.World(size)
    of_rank = [schedule] * size if isinstance(schedule, str) else schedule
    return outcomes_on_threads(
        size, lambda rank: world.group(rank, of_rank[rank]), body, within_s=within_s
    )


def outcomes_on_threads(size, join, body, within_s=60.0):
    """join(rank) makes the core's group, on the rank's thread; it is closed when body(group) ends."""
    outcomes = [None] * size

    def run(rank):
        try:
            outcomes[rank] = body(Group(join(rank), rank, size))
        except Exception as error:
            outcomes[rank] = error.with_traceback(None)  # a traceback would keep the group open

    threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(size)]
    for thread in threads:
        thread.start()
    give_up_at = time.monotonic() + within_s
    for thread in threads:
        thread.join(max(0.0, give_up_at - time.monotonic()))
    stuck = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    assert not stuck, f"ranks {stuck} still run after {within_s} s"
    return outcomes


def results_of(size, schedule, body):
    return without_errors(outcomes_of(size, schedule, body))


def without_errors(outcomes):
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


def bits(tensor):
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_equal_on_all_ranks(tensors, expected, what):
    assert torch.equal(tensors[0], expected), what
    for rank, tensor in enumerate(tensors):
        assert bits(tensor) == bits(tensors[0]), f"{what}: rank {rank} has other bits than rank 0"


@functools.cache
def exact_input(rank, num_elems, dtype, op):
    """To be cloned. The totals of 8 ranks are exact in every dtype: sums < 2^7, products < 2^9."""
    i = torch.arange(num_elems, dtype=torch.int64)
    if op == "prod":
        return ((i + rank) % 2 + 1).to(dtype)
    low = 0 if dtype == torch.uint8 else -7
    return ((i * 5 + rank * 3) % 16 + low).to(dtype)


@functools.cache
def exact_result(size, num_elems, dtype, op):
    inputs = [exact_input(rank, num_elems, dtype, op).to(torch.int64) for rank in range(size)]
    stacked = torch.stack(inputs)
    if op == "avg":
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        scale = torch.tensor(1.0 / size, dtype=torch.float64).to(accumulator)
        return (stacked.sum(0).to(accumulator) * scale).to(dtype)
    if op in ("min", "max"):
        return (stacked.amin(0) if op == "min" else stacked.amax(0)).to(dtype)
    return (stacked.sum(0) if op == "sum" else stacked.prod(0)).to(dtype)


def ops_of(dtype):
    return [op for op in OPS if op != "avg" or dtype.is_floating_point]


schedules = pytest.mark.parametrize("schedule", SCHEDULES)
sizes = pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
dtypes = pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=lambda d: str(d)[6:])


@schedules
@sizes
@dtypes
def test_all_reduce_is_exact(size, schedule, dtype):
    calls = [(op, n) for op in ops_of(dtype) for n in sorted({0, 1, size - 1, size, size + 1})]
    calls += [(op, 65537) for op in ops_of(dtype) if op in ("sum", "avg")]
    if dtype == torch.float32 and size == 3:
        calls.append(("sum", 1_000_003))

    def body(group):
        return [
            group.all_reduce(exact_input(group.rank, n, dtype, op).clone(), op) for op, n in calls
        ]

    ranks = results_of(size, schedule, body)
    for i, (op, n) in enumerate(calls):
        expected = exact_result(size, n, dtype, op)
        assert_equal_on_all_ranks([tensors[i] for tensors in ranks], expected, f"{op} of {n}")


@schedules
@sizes
@dtypes
def test_reduce_scatter_and_all_gather_are_exact(size, schedule, dtype):
    calls = [(op, n) for op in ops_of(dtype) for n in (0, 1, 77)]

    def body(group):
        results = []
        for op, n in calls:
            before = exact_input(group.rank, n * size, dtype, op)
            whole = before.clone()
            shard = group.reduce_scatter(torch.empty(n, dtype=dtype), whole, op)
            assert torch.equal(whole, before)
            results.append(group.all_gather(torch.empty(n * size, dtype=dtype), shard))
        return results

    ranks = results_of(size, schedule, body)
    for i, (op, n) in enumerate(calls):
        expected = exact_result(size, n * size, dtype, op)
        assert_equal_on_all_ranks([tensors[i] for tensors in ranks], expected, f"{op} of {n}")


@schedules
@sizes
def test_broadcast_from_every_root(size, schedule):
    def body(group):
        return [
            group.broadcast(torch.arange(n, dtype=torch.int32) + 1000 * group.rank, root)
            for root in range(size)
            for n in (0, 1, 333)
        ]

    for tensors in results_of(size, schedule, body):
        for i, (root, n) in enumerate((root, n) for root in range(size) for n in (0, 1, 333)):
            assert torch.equal(tensors[i], torch.arange(n, dtype=torch.int32) + 1000 * root)


@schedules
@pytest.mark.parametrize("size", [2, 3, 8])
def test_barrier_waits_for_the_last(size, schedule):
    arrived = []

    def body(group):
        if group.rank == size - 1:
            time.sleep(0.1)
        arrived.append(group.rank)
        group.barrier()
        return len(arrived)

    assert results_of(size, schedule, body) == [size] * size


def integers(rank, num_elems):
    return (torch.arange(num_elems) * 2654435761 + rank * 40503) << 13  # the sums wrap


@functools.cache
def reals(rank, num_elems):
    """To be cloned."""
    return torch.from_numpy(np.random.default_rng(rank).standard_normal(num_elems))


@functools.cache
def totals(size, num_elems):
    """Of integers; of reals, in a wider type; and how far float64 may be from the latter."""
    whole = torch.zeros(num_elems, dtype=torch.int64)
    wide, magnitude = np.zeros(num_elems, dtype=np.longdouble), np.zeros(num_elems)
    for rank in range(size):
        whole += integers(rank, num_elems)
        wide += reals(rank, num_elems).numpy()
        magnitude += abs(reals(rank, num_elems).numpy())
    return whole, wide, size * np.finfo(np.float64).eps * magnitude


@schedules
@pytest.mark.parametrize("size", [*range(1, 18), 24, 31, 32, 44])
def test_the_papers_sizes_and_lengths(size, schedule):
    lengths = sorted({0, 1, size - 1, size, size + 1, 65535 + size % 2})  # odd sizes: 65536
    if size in (2, 7):
        lengths.append(1_000_003)

    def body(group):
        whole = [group.all_reduce(integers(group.rank, n)) for n in lengths]
        return whole + [group.all_reduce(reals(group.rank, n).clone()) for n in lengths]

    ranks = results_of(size, schedule, body)
    for i, n in enumerate(lengths):
        integer_total, real_total, largest_error = totals(size, n)
        assert_equal_on_all_ranks([tensors[i] for tensors in ranks], integer_total, f"int64 x {n}")
        found = [tensors[len(lengths) + i] for tensors in ranks]
        assert (abs(found[0].numpy() - real_total) <= largest_error).all()
        assert len({bits(tensor) for tensor in found}) == 1


@schedules
@pytest.mark.parametrize("size", [2, 3, 6, 8, 13])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
def test_same_bits_on_all_ranks_and_from_run_to_run(size, schedule, dtype):
    def body(group):
        data = torch.randn(4099, generator=torch.Generator().manual_seed(group.rank))
        return [group.all_reduce(data.to(dtype), op) for op in ("sum", "avg")]

    first, second = results_of(size, schedule, body), results_of(size, schedule, body)
    for i in range(2):
        assert len({bits(tensors[i]) for tensors in first + second}) == 1


def test_direct_adds_in_rank_order():
    size = 7

    def data(rank):
        return torch.randn(1001, generator=torch.Generator().manual_seed(rank))

    expected = data(0)
    for rank in range(1, size):
        expected += data(rank)
    found = results_of(size, "direct", lambda group: group.all_reduce(data(group.rank)))
    assert_equal_on_all_ranks(found, expected, "direct")


@schedules
@pytest.mark.parametrize(("dtype", "large"), [(torch.bfloat16, 256), (torch.float16, 2048)])
def test_16_bit_floats_are_rounded_once(schedule, dtype, large):
    # large + 1 rounds back to large: any rounding on the way would lose the four ones.
    def body(group):
        ones = torch.full((9,), 1.0 if group.rank else float(large), dtype=dtype)
        return group.all_reduce(ones)

    expected = torch.full((9,), large + 4.0).to(dtype)
    assert_equal_on_all_ranks(results_of(5, schedule, body), expected, "sum")


@schedules
@pytest.mark.parametrize("op", ["sum", "avg", "prod", "min", "max"])
def test_nan_reaches_everyone(schedule, op):
    def body(group):
        data = torch.ones(11)
        if group.rank == 2:
            data[5] = math.nan
        return group.all_reduce(data, op)

    for tensor in results_of(5, schedule, body):
        assert torch.isnan(tensor).nonzero().flatten().tolist() == [5]


ODD_CALLS = {
    "op": (lambda g: g.all_reduce(torch.ones(64), "max"), "all_reduce(max, float32, 64 elements)"),
    "dtype": (
        lambda g: g.all_reduce(torch.ones(64, dtype=torch.int32)),
        "all_reduce(sum, int32, 64 elements)",
    ),
    "count": (lambda g: g.all_reduce(torch.ones(65)), "all_reduce(sum, float32, 65 elements)"),
    "nothing": (lambda g: g.all_reduce(torch.ones(0)), "all_reduce(sum, float32, 0 elements)"),
    "reduce_scatter": (
        lambda g: g.reduce_scatter(torch.ones(64 // g.size), torch.ones(64 // g.size * g.size)),
        "reduce_scatter(sum, float32,",
    ),
    "all_gather": (
        lambda g: g.all_gather(torch.ones(64 * g.size), torch.ones(64)),
        "all_gather(float32, 64 elements)",
    ),
    "broadcast": (
        lambda g: g.broadcast(torch.ones(64), g.rank),
        "broadcast(float32, 64 elements, root",
    ),
    "barrier": (lambda g: g.barrier(), "barrier()"),
    "sequence": (
        lambda g: [g.all_reduce(torch.ones(64)), g.all_reduce(torch.ones(64))],
        "all_reduce(sum, float32, 64 elements) as call 3",
    ),
}


def assert_all_mismatch(outcomes, *texts):
    for rank, error in enumerate(outcomes):
        assert isinstance(error, par.MismatchError), f"rank {rank}: {error!r}"
        assert error.peers == outcomes[0].peers
        for text in texts:
            assert text in str(error)


@schedules
@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("odd", ODD_CALLS)
def test_a_different_call_is_a_mismatch_on_every_rank(schedule, size, odd):
    odd_call, odd_text = ODD_CALLS[odd]

    def body(group):
        group.barrier()
        if group.rank == size - 1:
            odd_call(group)
        else:
            group.all_reduce(torch.ones(64))
            if odd == "sequence":
                group.barrier()

    usual = "barrier() as call 3" if odd == "sequence" else "all_reduce(sum, float32, 64 elements)"
    outcomes = outcomes_of(size, schedule, body, within_s=10.0)
    assert_all_mismatch(outcomes, f"rank {size - 1} called {odd_text}", f"called {usual}")
    assert outcomes[0].peers == (size - 1,)


@schedules
@pytest.mark.parametrize("size", [2, 4, 7, 8])
def test_halves_that_follow_different_patterns_hear_of_each_other(schedule, size):
    # Rings and trees of one half must not wait for the other half's pairs until the deadline.
    calls = [odd_call for odd_call, _ in ODD_CALLS.values()]
    for first in calls[3:8]:
        for second in calls[3:8]:
            if first is second:
                continue

            def body(group, first=first, second=second):
                (first if group.rank < (size + 1) // 2 else second)(group)

            assert_all_mismatch(outcomes_of(size, schedule, body, within_s=10.0))


@schedules
def test_disagreement_about_the_root(schedule):
    outcomes = outcomes_of(2, schedule, lambda g: g.broadcast(torch.ones(3), g.rank))
    assert_all_mismatch(outcomes, "root 0", "root 1")


def test_direct_knows_the_majority():
    # By the time rank 0 listens, the others' messages are there: its own call is the odd one.
    def body(group):
        group.barrier()
        if group.rank == 0:
            time.sleep(0.3)
            return group.all_reduce(torch.ones(7), "min")
        return group.all_reduce(torch.ones(7))

    outcomes = outcomes_of(4, "direct", body)
    assert_all_mismatch(outcomes, "rank 0 called all_reduce(min")


def test_different_schedules_are_a_mismatch():
    of_rank = ["halving_doubling", "halving_doubling", "ring"]
    outcomes = outcomes_of(3, of_rank, lambda g: g.all_reduce(torch.ones(8)))
    assert_all_mismatch(outcomes, "different schedules in all_reduce(sum, float32, 8 elements)")


@schedules
@pytest.mark.parametrize("missing", [0, 3])
def test_a_timeout_names_the_missing_rank(schedule, missing):
    is_over = threading.Event()
    raised = []

    def body(group):
        group.barrier()
        if group.rank == missing:
            is_over.wait(10)
        start = time.monotonic()
        try:
            group.all_reduce(torch.ones(100), timeout_s=0.4)
        finally:
            raised.append(time.monotonic() - start)
            if len(raised) == 4:
                is_over.set()

    outcomes = outcomes_of(5, schedule, body)
    for rank, error in enumerate(outcomes):
        assert isinstance(error, par.TimeoutError), f"rank {rank}: {error!r}"
        assert isinstance(error, TimeoutError)
        assert error.peers == (missing,)
        assert f"rank {missing} had not arrived" in str(error)
        assert "all_reduce(sum, float32, 100 elements) as call 2" in str(error)
    assert max(raised) < 1.4


@schedules
def test_a_rank_that_left_is_named_on_every_rank(schedule):
    def body(group):
        group.barrier()
        if group.rank != 1:
            group.all_reduce(torch.ones(100))

    start = time.monotonic()
    outcomes = outcomes_of(5, schedule, body)
    assert time.monotonic() - start < 2
    assert outcomes[1] is None
    for error in outcomes[:1] + outcomes[2:]:
        assert isinstance(error, par.PeerError)
        assert error.peers == (1,)


@schedules
def test_the_first_cause_is_raised_again(schedule):
    def body(group):
        causes = []
        for _ in range(3):
            with pytest.raises(par.MismatchError) as caught:
                group.all_reduce(torch.ones(4 + group.rank))
            causes.append(str(caught.value).partition("), in")[0])
        return causes

    causes = results_of(3, schedule, body)
    assert len({cause for of_rank in causes for cause in of_rank}) == 1


def test_bad_arguments_are_named():
    with pytest.raises(par.UsageError, match=r"'rign'.*direct, halving_doubling, ring"):
        inproc.World(2).group(0, "rign")
    with pytest.raises(par.UsageError, match=r"rank 2.*0\.\.1"):
        inproc.World(2).group(2, "ring")
    with pytest.raises(par.UsageError, match="at least 1"):
        inproc.World(0)
