"""Collectives over nodes of threads: two groups as one, in both forms, with the contract of one."""

import itertools
import threading
import time

import pytest
import torch
from test_scheduled_group import (
    FLOATS,
    INTEGERS,
    ODD_CALLS,
    assert_equal_on_all_ranks,
    bits,
    exact_input,
    exact_result,
    ops_of,
    outcomes_on_threads,
    without_errors,
)

import pyallreduce as par
from pyallreduce._core import inproc

ALWAYS_LEADERS = 2**64 - 1
FORMS = {"sharded": 0, "leaders": ALWAYS_LEADERS}
EVEN = [(ranks,) * nodes for nodes in range(1, 5) for ranks in range(1, 9)]
UNEVEN = [(1, 2), (2, 1), (3, 1, 2), (8, 5), (1, 7, 4), (2, 3, 8, 1), (4, 4, 4, 3)]

forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True, scope="module")
def _torch_on_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layouts(*sizes):
    return pytest.mark.parametrize("sizes", sizes, ids=lambda s: "+".join(map(str, s)))


def place_of(rank, sizes):
    """Node and local rank."""
    for node, size in enumerate(sizes):
        if rank < size:
            return node, rank
        rank -= size
    raise AssertionError("no such rank")


class Nodes:
    """A world per node, and one across the nodes per local rank; of unequal nodes only the leaders'."""

    def __init__(self, sizes, leaders_up_to_bytes=0, schedules=("direct", "ring")):
        self.sizes, self.leaders_up_to_bytes, self.schedules = sizes, leaders_up_to_bytes, schedules
        self.first_ranks = [sum(sizes[:node]) for node in range(len(sizes))]
        self.local = [
            inproc.World(global_ranks=list(range(first, first + size)))
            for first, size in zip(self.first_ranks, sizes, strict=True)
        ]
        self.across = [
            inproc.World(global_ranks=[first + local_rank for first in self.first_ranks])
            for local_rank in range(sizes[0] if len(set(sizes)) == 1 else 1)
        ]

    def join(self, rank, timeout_s=20.0, **other):
        node, local_rank = place_of(rank, self.sizes)
        arguments = {
            "local": self.local[node],
            "local_rank": local_rank,
            "across": self.across[local_rank] if local_rank < len(self.across) else None,
            "node_sizes": self.sizes,
            "node": node,
            "local_schedule": self.schedules[0],
            "across_schedule": self.schedules[1],
            "leaders_up_to_bytes": self.leaders_up_to_bytes,
            "timeout_s": timeout_s,
        }
        return inproc.hierarchical_group(**arguments | other)


def outcomes_of(sizes, form, body, within_s=60.0, **options):
    """What body(group) returned or raised on each rank."""
    nodes = Nodes(sizes, FORMS[form], **options)
    return outcomes_on_threads(sum(sizes), nodes.join, body, within_s=within_s)


def results_of(sizes, form, body, **options):
    return without_errors(outcomes_of(sizes, form, body, **options))


def check_all_reduce(sizes, form, calls, **options):
    """Of (op, dtype, number of elements), one after the other."""
    size = sum(sizes)

    def body(group):
        return [
            group.all_reduce(exact_input(group.rank, n, dtype, op).clone(), op)
            for op, dtype, n in calls
        ]

    ranks = results_of(sizes, form, body, **options)
    for i, (op, dtype, n) in enumerate(calls):
        expected = exact_result(size, n, dtype, op)
        what = f"{op} of {n} x {dtype}"
        assert_equal_on_all_ranks([tensors[i] for tensors in ranks], expected, what)


@forms
@layouts(*EVEN, *UNEVEN)
def test_all_collectives_are_exact_on_any_nodes(sizes, form):
    size = sum(sizes)
    shards = (0, 1, 5)
    roots = sorted({0, size // 2, size - 1})

    def body(group):
        results = []
        for n in shards:
            before = exact_input(group.rank, n * size, torch.float32, "sum")
            whole = before.clone()
            shard = group.reduce_scatter(torch.empty(n), whole)
            assert torch.equal(whole, before)
            results.append(group.all_gather(torch.empty(n * size), shard))
        for root in roots:
            sent = torch.arange(3, dtype=torch.int32) + 1000 * group.rank
            results.append(group.broadcast(sent, root))
        group.barrier()
        return results

    ranks = results_of(sizes, form, body)
    expected = [exact_result(size, n * size, torch.float32, "sum") for n in shards]
    expected += [torch.arange(3, dtype=torch.int32) + 1000 * root for root in roots]
    for i, tensor in enumerate(expected):
        assert_equal_on_all_ranks([results[i] for results in ranks], tensor, f"result {i}")

    lengths = {0, 1, 77, *(n + d for n in (sizes[0], size) for d in (-1, 0, 1))}
    check_all_reduce(sizes, form, [("sum", torch.float32, n) for n in sorted(lengths)])


@forms
@layouts((2, 2), (3, 3, 3), (1, 1, 1, 1), (4,), (3, 1, 2))
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=lambda d: str(d)[6:])
def test_every_dtype_and_op(sizes, form, dtype):
    size = sum(sizes)
    calls = [(op, dtype, n) for op in ops_of(dtype) for n in (0, 1, 37)]
    check_all_reduce(sizes, form, calls)

    def body(group):
        results = []
        for op in ops_of(dtype):
            whole = exact_input(group.rank, 7 * size, dtype, op).clone()
            shard = group.reduce_scatter(torch.empty(7, dtype=dtype), whole, op)
            results.append(group.all_gather(torch.empty(7 * size, dtype=dtype), shard))
        return results

    ranks = results_of(sizes, form, body)
    for i, op in enumerate(ops_of(dtype)):
        expected = exact_result(size, 7 * size, dtype, op)
        assert_equal_on_all_ranks([tensors[i] for tensors in ranks], expected, op)


@forms
@layouts((2, 2), (3, 3), (3, 1))
def test_large_buffers(sizes, form):
    calls = [("sum", torch.float32, 1_000_003), ("avg", torch.bfloat16, 300_001)]
    check_all_reduce(sizes, form, calls)


@pytest.mark.parametrize("local", par.schedules.names())
@pytest.mark.parametrize("across", par.schedules.names())
def test_any_schedule_on_either_level(local, across):
    for form in FORMS:
        calls = [("sum", torch.int64, 101), ("avg", torch.float16, 64)]
        check_all_reduce((3, 3), form, calls, schedules=(local, across))


def test_the_threshold_counts_bytes_of_the_buffer():
    # Leaders add directly, in rank order, rings of shards start where the shard belongs.
    def body(group):
        return [group.all_reduce(reals(group.rank, n)) for n in (64, 65)]

    def results(leaders_up_to_bytes):
        nodes = Nodes((3, 3), leaders_up_to_bytes, schedules=("direct", "ring"))
        return without_errors(outcomes_on_threads(6, nodes.join, body))[0]

    at_threshold, leaders, sharded = results(256), results(ALWAYS_LEADERS), results(0)
    for i in range(2):  # else this test tells nothing
        assert bits(leaders[i]) != bits(sharded[i])
    assert bits(at_threshold[0]) == bits(leaders[0])
    assert bits(at_threshold[1]) == bits(sharded[1])


def reals(rank, num_elems, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(num_elems, generator=generator).to(dtype)


@forms
@layouts((3, 3), (2, 2, 2), (4, 4, 4, 4), (2, 1, 3))
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
def test_same_bits_on_all_ranks_and_from_run_to_run(sizes, form, dtype):
    def body(group):
        return [group.all_reduce(reals(group.rank, 1003, dtype), op) for op in ("sum", "avg")]

    first, second = results_of(sizes, form, body), results_of(sizes, form, body)
    for i in range(2):
        assert len({bits(tensors[i]) for tensors in first + second}) == 1


@forms
@layouts((3, 3), (2, 4))
@pytest.mark.parametrize(("dtype", "large"), [(torch.bfloat16, 256), (torch.float16, 2048)])
def test_16_bit_floats_are_rounded_once(sizes, form, dtype, large):
    # large + 1 rounds back to large: rounding the first node's sum would lose the one that, with
    # the second node's, makes large + 2.
    addends = {0: float(large), 1: 1.0, sizes[0]: 1.0}

    def addend(rank, n):
        return torch.full((n,), addends.get(rank, 0.0), dtype=dtype)

    def body(group):
        whole = group.all_reduce(addend(group.rank, 9))
        return whole, group.reduce_scatter(torch.empty(2, dtype=dtype), addend(group.rank, 12))

    ranks = results_of(sizes, form, body)
    total = torch.tensor(large + 2.0).to(dtype)
    assert_equal_on_all_ranks([whole for whole, _ in ranks], total.expand(9), "all_reduce")
    assert_equal_on_all_ranks([shard for _, shard in ranks], total.expand(2), "reduce_scatter")


@forms
def test_an_average_overflows_only_if_it_is_too_large_itself(form):
    def body(group):
        return group.all_reduce(torch.full((8,), 60000.0, dtype=torch.float16), "avg")

    expected = torch.full((8,), 60000.0, dtype=torch.float16)
    assert_equal_on_all_ranks(results_of((2, 2), form, body), expected, "avg")


@forms
@layouts((2, 2), (3, 1, 2))
def test_barrier_waits_for_the_last(sizes, form):
    size = sum(sizes)
    for last in (0, size - 1):
        arrived = []

        def body(group, last=last, arrived=arrived):
            if group.rank == last:
                time.sleep(0.1)
            arrived.append(group.rank)
            group.barrier()
            return len(arrived)

        assert results_of(sizes, form, body) == [size] * size


# --- ranks that call different things --------------------------------------------------------------------------------

# The usual call and "count" (65 elements) have equal shards: only the whole call tells them apart.
# So it is with "avg", which is a sum in both groups.
CALLS = {
    **{name: call for name, call in ODD_CALLS.items() if name != "sequence"},
    "usual": (lambda g: g.all_reduce(torch.ones(64)), "all_reduce(sum, float32, 64 elements)"),
    "avg": (lambda g: g.all_reduce(torch.ones(64), "avg"), "all_reduce(avg, float32, 64 elements)"),
    "broadcast": (
        lambda g: g.broadcast(torch.ones(64), 1),
        "broadcast(float32, 64 elements, root 1)",
    ),
}
MIXED = [(2, 2), (3, 3), (1, 1), (2, 2, 2), (2, 3)]


@forms
@layouts(*MIXED)
@pytest.mark.parametrize("odd", [name for name in CALLS if name != "usual"])
def test_a_node_that_calls_something_else_is_named_on_every_rank(sizes, form, odd):
    odd_node = len(sizes) - 1

    def body(group):
        group.barrier()
        is_odd = place_of(group.rank, sizes)[0] == odd_node
        CALLS[odd if is_odd else "usual"][0](group)

    outcomes = outcomes_of(sizes, form, body, within_s=10.0)
    # Each local rank may meet it in its own group across.
    assert_mismatch_everywhere(outcomes, f"called {CALLS['usual'][1]}", f"called {CALLS[odd][1]}")
    for error in outcomes:
        assert {place_of(peer, sizes)[0] for peer in error.peers} == {odd_node}


@forms
@layouts(*MIXED)
@pytest.mark.parametrize("odd", ["count", "avg", "all_gather", "broadcast", "barrier"])
def test_a_rank_that_calls_something_else_is_named_on_every_rank(sizes, form, odd):
    odd_rank = sum(sizes) - 1

    def body(group):
        group.barrier()
        CALLS[odd if group.rank == odd_rank else "usual"][0](group)

    outcomes = outcomes_of(sizes, form, body, within_s=10.0)
    texts = f"called {CALLS['usual'][1]}", f"rank {odd_rank} called {CALLS[odd][1]}"
    assert_mismatch_everywhere(outcomes, *texts)
    assert {error.peers for error in outcomes} == {(odd_rank,)}


def assert_mismatch_everywhere(outcomes, *texts):
    for rank, error in enumerate(outcomes):
        assert isinstance(error, par.MismatchError), f"rank {rank}: {error!r}"
        for text in texts:
            assert text in str(error), f"rank {rank}: {error}"


@forms
@layouts((2, 2), (3, 3), (2, 3))
def test_any_two_calls_in_any_pattern_hear_of_each_other(sizes, form):
    calls = [CALLS[name][0] for name in ("usual", "reduce_scatter", "all_gather", "broadcast")]
    calls.append(CALLS["barrier"][0])
    # Nodes that differ; nodes that are torn, equally and crosswise.
    patterns = [
        lambda node, local_rank: node == 0,
        lambda node, local_rank: local_rank == 0,
        lambda node, local_rank: (node + local_rank) % 2 == 0,
    ]
    for first, second in itertools.permutations(calls, 2):
        for is_first in patterns:

            def body(group, first=first, second=second, is_first=is_first):
                (first if is_first(*place_of(group.rank, sizes)) else second)(group)

            assert_mismatch_everywhere(outcomes_of(sizes, form, body, within_s=10.0))


def test_roots_on_different_nodes_are_a_mismatch():
    def body(group):
        group.broadcast(torch.ones(3), root=place_of(group.rank, (2, 2))[0] * 2)

    outcomes = outcomes_of((2, 2), "sharded", body, within_s=10.0)
    assert_mismatch_everywhere(outcomes, "root 0", "root 2")


@layouts((2, 2), (1, 3))
def test_different_plans_are_a_mismatch_before_the_first_call(sizes):
    size = sum(sizes)
    nodes = Nodes(sizes)
    outcomes = outcomes_on_threads(
        size,
        lambda rank: nodes.join(rank, leaders_up_to_bytes=4096 * (rank == size - 1)),
        lambda group: None,
        within_s=10.0,
    )
    assert_mismatch_everywhere(outcomes, "different thresholds")


# --- ranks that are missing ------------------------------------------------------------------------------------------


@forms
@layouts((2, 2), (3, 3, 3), (2, 1, 3), (1, 1), (4,))
def test_a_rank_that_left_is_named_on_every_rank(sizes, form):
    size = sum(sizes)
    for gone in {0, size // 2, size - 1}:
        outcomes = outcomes_of(sizes, form, leaves(gone), within_s=10.0)
        assert outcomes[gone] is None
        for rank, error in enumerate(outcomes):
            if rank != gone:
                assert isinstance(error, par.PeerError), f"rank {rank}: {error!r}"
                assert error.peers == (gone,), f"rank {rank}: {error}"
                assert f"rank {gone} left" in str(error)
                assert str(error).count("all_reduce(sum, float32, 100 elements) as call 2") == 1


def leaves(gone):
    def body(group):
        group.barrier()
        if group.rank != gone:
            group.all_reduce(torch.ones(100))

    return body


@forms
@layouts((2, 2), (2, 1, 3), (3, 3))
def test_a_silent_rank_is_named_on_every_rank_by_the_deadline(sizes, form):
    size = sum(sizes)
    for silent in (0, size - 1):
        is_over = threading.Event()
        raised = []

        def body(group, silent=silent, is_over=is_over, raised=raised):
            group.barrier()
            if group.rank == silent:
                is_over.wait(10)
            start = time.monotonic()
            try:
                group.all_reduce(torch.ones(100), timeout_s=0.4)
            finally:
                raised.append(time.monotonic() - start)
                if len(raised) == size - 1:
                    is_over.set()

        outcomes = outcomes_of(sizes, form, body)
        for rank, error in enumerate(outcomes):
            assert isinstance(error, par.TimeoutError), f"rank {rank}: {error!r}"
            assert error.peers == (silent,), f"rank {rank}: {error}"
            assert f"rank {silent} had not arrived" in str(error)
            assert "0.4 s" in str(error)
        assert max(raised) < 1.4


@forms
@layouts((2, 2), (2, 3))
def test_the_first_cause_is_raised_again(sizes, form):
    def body(group):
        causes = []
        for _ in range(3 if group.rank else 0):  # rank 0 leaves
            with pytest.raises(par.PeerError) as caught:
                group.all_reduce(torch.ones(10))
            causes.append(caught.value.peers)
        return causes

    outcomes = results_of(sizes, form, body)
    assert outcomes == [[]] + [[(0,)] * 3] * (sum(sizes) - 1)


def test_bad_arguments_are_named():
    nodes = Nodes((2, 2))
    bad = [
        ({"node": 2, "across": None}, "node 2 of 2 nodes"),
        ({"node_sizes": [3, 3]}, "local group of 2 ranks on a node of 3"),
        ({"across": None}, "needs that rank and that size in its group across"),
        ({"node_sizes": [2, 2, 2]}, "needs that rank and that size in its group across"),
    ]
    for arguments, text in bad:
        with pytest.raises(par.UsageError, match=text):
            nodes.join(0, **arguments)
    with pytest.raises(par.UsageError, match="only leaders"):
        Nodes((2, 1)).join(1, across=inproc.World(2))
