"""Schedules are data: executed on symbols, every size up to 64, no bytes and no threads."""

import copy
import functools
import math
import subprocess
import sys
from collections import defaultdict

import pytest

import pyallreduce as par
from pyallreduce._core import schedules as parts

SIZES = range(1, 65)
POWERS_OF_TWO = [1, 2, 4, 8, 16, 32, 64]


def plain(schedules):
    """Per rank, per step: (sends, recvs), lists of [peer, begin, end, reduce]."""

    def lists(transfers):
        return [[t.peer, t.begin, t.end, t.reduce] for t in transfers]

    return [[(lists(step.sends), lists(step.recvs)) for step in s.steps] for s in schedules]


@functools.cache
def all_ranks(name, size):
    """The number of chunks, and the plain schedule of each rank (to be left as it is)."""
    schedules = [getattr(parts, name)(rank, size) for rank in range(size)]
    assert [(s.rank, s.size) for s in schedules] == [(rank, size) for rank in range(size)]
    (num_chunks,) = {s.num_chunks for s in schedules}
    return num_chunks, plain(schedules)


def check_step(sends, recvs, rank, num_chunks):
    """What a schedule promises about one rank's transfers of one step."""
    for peer, begin, end, _ in sends + recvs:
        assert peer != rank, f"rank {rank} talks to itself"
        assert 0 <= begin < end <= num_chunks, f"chunks [{begin}, {end}) of {num_chunks}"
    sent = {c for _, begin, end, _ in sends for c in range(begin, end)}
    written = [c for _, begin, end, reduce in recvs if not reduce for c in range(begin, end)]
    added = {c for _, begin, end, reduce in recvs if reduce for c in range(begin, end)}
    assert not sent & set(written), f"rank {rank} overwrites a chunk that it is sending"
    assert len(set(written)) == len(written), f"rank {rank} receives a chunk twice"
    assert not added & set(written), f"rank {rank} adds to a chunk that it overwrites"


def simulate(num_chunks, ranks, num_steps=None, held=None):
    """Executes on symbols: held[rank][chunk] is the bit set of ranks that have contributed."""
    size = len(ranks)
    held = held or [[1 << rank] * num_chunks for rank in range(size)]
    assert len({len(steps) for steps in ranks}) == 1, "ranks have different numbers of steps"
    for index in range(len(ranks[0]) if num_steps is None else num_steps):
        in_flight = defaultdict(list)
        for rank in range(size):
            sends, recvs = ranks[rank][index]
            check_step(sends, recvs, rank, num_chunks)
            for peer, begin, end, reduce in sends:
                in_flight[rank, peer].append((begin, end, reduce, held[rank][begin:end]))
        for rank in range(size):
            for peer, begin, end, reduce in ranks[rank][index][1]:
                where = f"step {index}: rank {rank} from {peer}, chunks [{begin}, {end})"
                assert in_flight[peer, rank], f"{where}: nothing was sent"
                sent_begin, sent_end, sent_reduce, values = in_flight[peer, rank].pop(0)
                assert (sent_begin, sent_end, sent_reduce) == (begin, end, reduce), (
                    f"{where}: something else was sent"
                )
                for chunk, value in zip(range(begin, end), values, strict=True):
                    if reduce:
                        twice = held[rank][chunk] & value
                        assert not twice, f"{where}: counted twice, ranks {twice:b}"
                        held[rank][chunk] |= value
                    else:
                        held[rank][chunk] = value
        assert not any(in_flight.values()), f"step {index}: sent, but not received: {in_flight}"
    return held


def check_all_reduce(num_chunks, ranks):
    everyone = (1 << len(ranks)) - 1
    for rank, chunks in enumerate(simulate(num_chunks, ranks)):
        assert chunks == [everyone] * num_chunks, f"rank {rank} ends without all contributions"


def chunks_sent(steps):
    return sum(end - begin for sends, _ in steps for _, begin, end, _ in sends)


def algorithms():
    return pytest.mark.parametrize("name", par.schedules.names())


@algorithms()
def test_every_contribution_is_summed_once_and_reaches_all(name):
    for size in SIZES:
        check_all_reduce(*all_ranks(name, size))


@algorithms()
def test_what_a_receive_completes_becomes_the_total_at_once(name):
    # The average is scaled where the total appears: no range may be half total, half partial sum.
    for size in SIZES:
        for steps in all_ranks(name, size)[1]:
            last = {}
            for index, (sends, recvs) in enumerate(steps):
                for _, begin, end, reduce in sends + recvs:
                    last.update(dict.fromkeys(range(begin, end), index) if reduce else {})
            for index, (_, recvs) in enumerate(steps):
                for _, begin, end, reduce in recvs:
                    assert not reduce or len({last[c] == index for c in range(begin, end)}) == 1


@algorithms()
def test_one_rank_has_nothing_to_do(name):
    s = getattr(par.schedules, name)(0, 1)
    assert s.num_chunks == 1
    assert s.steps == ()


@pytest.mark.parametrize("size", SIZES)
def test_number_of_chunks(size):
    assert par.schedules.ring(0, size).num_chunks == size
    assert par.schedules.direct(0, size).num_chunks == size
    assert par.schedules.halving_doubling(0, size).num_chunks == 1 << (size.bit_length() - 1)


def test_number_of_steps():
    for size in SIZES:
        extra = 0 if size in POWERS_OF_TWO else 2  # one to climb to the largest block, one back
        halving = 2 * int(math.log2(size)) + extra
        assert len(par.schedules.ring(0, size).steps) == 2 * (size - 1)
        assert len(par.schedules.halving_doubling(0, size).steps) == halving
        assert len(par.schedules.direct(0, size).steps) == (2 if size > 1 else 0)


@algorithms()
def test_bytes_are_exactly_the_least_possible(name):
    for size in POWERS_OF_TWO if name == "halving_doubling" else SIZES:
        num_chunks, ranks = all_ranks(name, size)
        for steps in ranks:
            assert chunks_sent(steps) * size == 2 * (size - 1) * num_chunks


@pytest.mark.parametrize(
    ("size", "most"),
    [(3, 1.5), (5, 1.75), (6, 1.75), (7, 2), (12, 1.875), (13, 2), (24, 1.9375), (31, 2)],
)
def test_binary_blocks_bytes(size, most):
    num_chunks, ranks = all_ranks("halving_doubling", size)
    assert max(map(chunks_sent, ranks)) / num_chunks == most


def test_binary_blocks_never_send_more_than_twice_the_buffer():
    for size in SIZES:
        num_chunks, ranks = all_ranks("halving_doubling", size)
        assert max(map(chunks_sent, ranks)) <= 2 * num_chunks


@pytest.mark.parametrize("size", [3, 5, 9, 17, 33])
def test_a_lone_rank_sends_the_buffer_once_in_one_message_per_peer(size):
    lone = all_ranks("halving_doubling", size)[1][-1]
    assert chunks_sent(lone) == size - 1
    assert sum(len(sends) for sends, _ in lone) == size - 1


def test_halving_leaves_chunks_with_their_bit_reversed_owners():
    held = simulate(*all_ranks("halving_doubling", 8), num_steps=3)
    owned = ["".join("ABCDEFGH"[c] for c in range(8) if chunks[c] == 0xFF) for chunks in held]
    assert owned == ["A", "E", "C", "G", "B", "F", "D", "H"]


def test_halving_sends_the_most_to_the_nearest():
    for rank in range(16):
        steps = par.schedules.halving_doubling(rank, 16).steps[:4]
        assert [step.sends[0].peer for step in steps] == [rank ^ 1, rank ^ 2, rank ^ 4, rank ^ 8]
        assert [step.sends[0].end - step.sends[0].begin for step in steps] == [8, 4, 2, 1]


def test_ring_talks_to_neighbours_only():
    for step in par.schedules.ring(3, 7).steps:
        assert [t.peer for t in step.sends] == [4]
        assert [t.peer for t in step.recvs] == [2]


@pytest.mark.parametrize("reduce_scatter", ["ring_reduce_scatter", "direct_reduce_scatter"])
def test_reduce_scatter_leaves_chunk_r_with_rank_r(reduce_scatter):
    for size in [*range(1, 18), 64]:
        held = simulate(*all_ranks(reduce_scatter, size))
        assert all(held[rank][rank] == (1 << size) - 1 for rank in range(size))


def test_ring_all_gather_starts_from_chunk_r_at_rank_r():
    for size in [*range(1, 18), 64]:
        start = [[(rank == c) << c for c in range(size)] for rank in range(size)]
        held = simulate(*all_ranks("ring_all_gather", size), held=start)
        assert all(chunks == [1 << c for c in range(size)] for chunks in held)


def test_binomial_tree_reaches_all_from_any_root():
    for size in range(1, 20):
        for root in range(size):
            ranks = plain([parts.binomial_tree(rank, size, root) for rank in range(size)])
            assert len(ranks[0]) == math.ceil(math.log2(size))
            assert simulate(1, ranks) == [[1 << root]] * size


# Each damages one transfer of a correct schedule; some at one side only, some alike at both.
def flip_reduce(ranks, rank, step, peer_recvs):
    transfer = ranks[rank][step][0][0]
    transfer[3] = not transfer[3]


def flip_reduce_on_both_sides(ranks, rank, step, peer_recvs):
    flip_reduce(ranks, rank, step, peer_recvs)
    peer_recvs[0][3] = not peer_recvs[0][3]


def shift_chunk(ranks, rank, step, peer_recvs):
    ranks[rank][step][0][0][1] += 1
    ranks[rank][step][0][0][2] += 1


def drop_send(ranks, rank, step, peer_recvs):
    del ranks[rank][step][0][0]


def drop_on_both_sides(ranks, rank, step, peer_recvs):
    peer = ranks[rank][step][0][0][0]
    del ranks[rank][step][0][0]
    ranks[peer][step][1].remove(peer_recvs[0])


def repeat_on_both_sides(ranks, rank, step, peer_recvs):
    peer = ranks[rank][step][0][0][0]
    ranks[rank][step][0].insert(0, list(ranks[rank][step][0][0]))
    ranks[peer][step][1].insert(0, list(peer_recvs[0]))


def send_to_oneself(ranks, rank, step, peer_recvs):
    ranks[rank][step][0][0][0] = rank


@algorithms()
@pytest.mark.parametrize("size", [2, 4, 6, 7])
@pytest.mark.parametrize(
    "damage",
    [
        flip_reduce,
        flip_reduce_on_both_sides,
        shift_chunk,
        drop_send,
        drop_on_both_sides,
        repeat_on_both_sides,
        send_to_oneself,
    ],
)
def test_negative_control_damage_is_noticed(name, size, damage):
    num_chunks, intact = all_ranks(name, size)
    places = [(r, i) for r in range(size) for i, step in enumerate(intact[r]) if step[0]]
    for rank, step in places:
        ranks = copy.deepcopy(intact)
        peer = ranks[rank][step][0][0][0]
        damage(ranks, rank, step, [t for t in ranks[peer][step][1] if t[0] == rank])
        with pytest.raises(AssertionError):
            check_all_reduce(num_chunks, ranks)


def seconds_by_simulation(num_chunks, ranks, buffer_bytes, alpha_s, beta_s_per_byte):
    """Each rank sends one message at a time and receives one at a time; steps are in order."""
    free = [0.0] * len(ranks)
    for index in range(len(ranks[0])):
        arrivals = defaultdict(list)
        done = list(free)
        for rank, steps in enumerate(ranks):
            for peer, begin, end, _ in steps[index][0]:
                took = alpha_s + (end - begin) * buffer_bytes / num_chunks * beta_s_per_byte
                done[rank] += took
                arrivals[peer].append((done[rank], took))
        for rank, incoming in arrivals.items():
            clock = free[rank]
            for at, took in sorted(incoming):
                clock = max(at, clock + took)
            done[rank] = max(done[rank], clock)
        free = done
    return max(free)


@algorithms()
@pytest.mark.parametrize(("alpha_s", "beta_s_per_byte"), [(5e-5, 1.6e-10), (1e-6, 1e-9), (1, 0)])
def test_cost_is_what_the_schedule_takes(name, alpha_s, beta_s_per_byte):
    for size in [*range(1, 18), 24, 31, 32, 44, 63]:
        took = seconds_by_simulation(*all_ranks(name, size), 4e6, alpha_s, beta_s_per_byte)
        cost = par.schedules.cost(name, size, 4e6, alpha_s, beta_s_per_byte)
        if name == "halving_doubling" and size not in POWERS_OF_TWO:
            assert took <= cost * (1 + 1e-9), size
            assert cost <= 1.25 * took, size
        else:
            assert cost == pytest.approx(took, rel=1e-9), size


def test_cost_of_the_papers_comparison():
    def slower(buffer_bytes):
        link = {"size": 32, "bytes": buffer_bytes, "alpha_s": 50e-6, "beta_s_per_byte": 1 / 6.25e9}
        cost = par.schedules.cost
        return cost(name="ring", **link) / cost(name="halving_doubling", **link)

    assert slower(2.5e6) >= 3
    assert slower(0) == pytest.approx(6.2)
    assert slower(1e8) < 1.3


def test_select_is_the_cheapest():
    for size in SIZES:
        for buffer_bytes in [0, 1e3, 1e6, 1e9]:
            link = (size, buffer_bytes, 5e-5, 1.6e-10)
            costs = {name: par.schedules.cost(name, *link) for name in par.schedules.names()}
            assert costs[par.schedules.select(*link)] == min(costs.values())


@pytest.mark.parametrize(("rank", "size"), [(-1, 4), (4, 4), (0, 0), (0, -3)])
@algorithms()
def test_bad_arguments_are_named(name, rank, size):
    with pytest.raises(par.UsageError) as caught:
        getattr(par.schedules, name)(rank, size)
    assert str(size) in str(caught.value)
    if size > 0:
        assert str(rank) in str(caught.value)
        assert "0..3" in str(caught.value)
    else:
        assert "at least 1" in str(caught.value)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(par.UsageError, match=r"'rign'.*direct, halving_doubling, ring"):
        par.schedules.cost("rign", 4, 1, 1, 1)


def test_schedules_are_values():
    s = par.schedules.ring(1, 3)
    transfer = s.steps[0].sends[0]
    assert s == par.schedules.ring(1, 3) != par.schedules.ring(2, 3)
    assert isinstance(s.steps, tuple)
    assert isinstance(s.steps[0].sends, tuple)
    assert repr(transfer) == "Transfer(peer=2, begin=0, end=1, reduce=True)"
    assert eval(repr(s), vars(par.schedules)) == s
    with pytest.raises(AttributeError):
        transfer.peer = 0


def test_needs_no_torch():
    block = "import sys; sys.modules['torch'] = None; "
    code = block + "import pyallreduce as par; par.schedules.ring(0, 4)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
