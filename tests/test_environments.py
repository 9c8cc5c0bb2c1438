"""Containers, strict seccomp profiles, small limits, strangers: it works by the next means, or says what to change."""

from __future__ import annotations

import errno
import os
import resource
import secrets
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import places
import pytest
import torch
import torch.distributed as dist

import pyallreduce as par
from pyallreduce import _core
from ranks import Outcome, free_port_pair, outcomes_of, run_ranks

# --- where shared memory lies ----------------------------------------------------------------------------------------


def shared_memory_of_this_process() -> str:
    """Where its writable shared mappings lie, by /proc/self/maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return "\n".join(line for line in lines if line.split()[1] == "rw-s")


def sum_in_shared_memory(comm: par.Communicator, mebibytes: int) -> None:
    symmetric = comm.symmetric_empty(mebibytes << 18).fill_(comm.rank + 1)
    plain = torch.full((1000,), comm.rank + 1.0)
    comm.all_reduce(symmetric)
    comm.all_reduce(plain)
    expected = comm.size * (comm.size + 1) / 2
    assert (symmetric == expected).all()
    assert (plain == expected).all()


def live_without_memfd(rank: int, n: int, error: int) -> None:
    places.refuse("memfd_create", error)
    comm = par.init()
    sum_in_shared_memory(comm, 1)
    where = shared_memory_of_this_process()
    assert "/dev/shm/" in where
    assert "memfd" not in where
    comm.close()


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM], ids=errno.errorcode.get)
def test_without_memfd_an_unnamed_file_in_dev_shm_serves(error: int) -> None:
    places.require_seccomp()
    before = set(os.listdir("/dev/shm"))
    run_ranks(2, live_without_memfd, error)
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "pyallreduce" in name}


def live_with_a_tiny_dev_shm(rank: int, n: int, memfd: bool, folder: str) -> None:
    places.enter(places.NEW_MOUNTS)
    places.mount_tmpfs("/dev/shm", "64k")
    os.environ["TMPDIR"] = folder
    if not memfd:
        places.refuse("memfd_create", errno.ENOSYS)
    comm = par.init()
    sum_in_shared_memory(comm, 2)
    assert ("memfd" if memfd else folder) in shared_memory_of_this_process()
    assert os.listdir(folder) == []
    comm.close()


@pytest.mark.parametrize("memfd", [True, False], ids=["memfd", "no memfd"])
def test_a_tiny_dev_shm_does_not_matter(memfd: bool, tmp_path: Path) -> None:
    places.require(places.NEW_MOUNTS)
    places.require_seccomp()
    run_ranks(2, live_with_a_tiny_dev_shm, memfd, str(tmp_path))


def find_no_place(rank: int, n: int) -> str:
    if rank == 0:  # who makes the segments
        places.enter(places.NEW_MOUNTS)
        places.mount_tmpfs("/dev/shm", "64k")
        places.refuse("memfd_create", errno.EPERM)
        os.environ["TMPDIR"] = "/proc"
    with pytest.raises(par.Error) as raised:
        par.init()
    assert raised.value.peers == (() if rank == 0 else (0,))
    return str(raised.value)


def test_no_place_for_shared_memory_is_told_to_all_ranks() -> None:
    places.require(places.NEW_MOUNTS)
    places.require_seccomp()
    for message in run_ranks(3, find_no_place):
        for words in (
            "memfd_create: Operation not permitted",
            "in /dev/shm: No space left",
            "in /proc: ",
        ):
            assert words in message
        for remedy in ("seccomp", "--shm-size", "TMPDIR"):
            assert remedy in message


# --- how a death is noticed ------------------------------------------------------------------------------------------


def nowhere_special(rank: int) -> None:
    pass


def without_pidfd(rank: int) -> None:
    places.refuse("pidfd_open", errno.ENOSYS)


def with_pidfd_forbidden_to_rank_1(rank: int) -> None:
    if rank == 1:
        places.refuse("pidfd_open", errno.EPERM)


def in_a_pid_namespace_each(rank: int) -> None:
    places.enter_pid_namespace()


def with_rank_2_in_a_pid_namespace(rank: int) -> None:
    if rank == 2:
        places.enter_pid_namespace()


# Where three ranks live, and whether the one that dies has a child that lives on with all its descriptors, as
# DataLoader's workers are.
LIVES: list[tuple[Callable[[int], None], bool]] = [
    (nowhere_special, False),
    (without_pidfd, False),
    (with_pidfd_forbidden_to_rank_1, False),
    (in_a_pid_namespace_each, False),
    (with_rank_2_in_a_pid_namespace, False),
    (without_pidfd, True),
]


def require(go_there: Callable[[int], None]) -> None:
    if "pidfd" in go_there.__name__:
        places.require_seccomp()
    if "namespace" in go_there.__name__:
        places.require(places.NEW_PIDS)


def is_possible(go_there: Callable[[int], None]) -> bool:
    try:
        require(go_there)
    except pytest.skip.Exception:
        return False
    return True


def be_killed_while_rank_0_computes(place: int, n: int, lives: list[int], ports: list[int]) -> None:
    """Three neighbouring places are the ranks of one life."""
    job, rank = divmod(place, 3)
    go_there, has_child = LIVES[lives[job]]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="3", LOCAL_WORLD_SIZE="3")
    os.environ["MASTER_PORT"] = str(ports[job])
    go_there(rank)
    comm = par.init()
    sum_in_shared_memory(comm, 1)
    if rank == 2:
        if has_child and os.fork() == 0:
            time.sleep(4)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0:
        time.sleep(3)
    comm.barrier()


@pytest.fixture(scope="module")
def deaths() -> dict[int, list[Outcome]]:
    """By the index of a life that is possible here: how its three ranks ended. All at once: they mostly wait."""
    lives = [i for i, (go_there, _) in enumerate(LIVES) if is_possible(go_there)]
    ports: set[int] = set()
    while len(ports) < len(lives):
        ports.add(free_port_pair())
    outcomes = outcomes_of(3 * len(lives), be_killed_while_rank_0_computes, lives, list(ports))
    return {life: outcomes[3 * job : 3 * job + 3] for job, life in enumerate(lives)}


@pytest.mark.parametrize(
    "life",
    range(len(LIVES)),
    ids=[f"{go_there.__name__}{'-child' * has_child}" for go_there, has_child in LIVES],
)
def test_a_death_is_noticed_by_every_rank_itself(
    life: int, deaths: dict[int, list[Outcome]]
) -> None:
    require(LIVES[life][0])
    for survivor in deaths[life][:2]:
        assert isinstance(survivor.error, par.PeerError), survivor.trace
        assert survivor.error.peers == (2,)
        assert "died" in str(survivor.error)
    # Rank 1 did not need rank 0, which computes for 3 s after the death, to notice.
    assert deaths[life][1].ended_s < deaths[life][0].ended_s - 1.5


def close_in_order(rank: int, n: int) -> None:
    without_pidfd(rank)
    comm = par.init()
    comm.barrier()
    if rank == 1:
        comm.close()
        del comm  # its lifeline goes with it; the process stays
        time.sleep(1)
        return
    with pytest.raises(par.PeerError, match="closed the communicator") as raised:
        comm.barrier()
    assert raised.value.peers == (1,)


def test_without_pidfd_a_close_is_not_taken_for_a_death() -> None:
    places.require_seccomp()
    run_ranks(2, close_in_order)


# --- network namespaces ----------------------------------------------------------------------------------------------


def meet_across_network_namespaces(rank: int, n: int, path: str) -> None:
    if rank == 1:
        places.enter(places.NEW_NETWORK)
    with pytest.raises(
        par.UsageError, match=r"ranks 0 and 1 .* different network namespaces"
    ) as raised:
        par.init(store=dist.FileStore(path, n), rank=rank, size=n)
    assert "--network=" in str(raised.value)


def test_ranks_in_different_network_namespaces_are_told_what_to_change(tmp_path: Path) -> None:
    places.require(places.NEW_NETWORK)
    run_ranks(2, meet_across_network_namespaces, str(tmp_path / "store"))


def lack_proc(rank: int, n: int, path: str) -> None:
    places.enter(places.NEW_MOUNTS)
    places.mount_tmpfs("/proc", "64k")
    with pytest.raises(par.Error, match="Mount /proc"):
        par.init(store=dist.FileStore(path, n), rank=rank, size=n)


def test_a_missing_proc_is_named(tmp_path: Path) -> None:
    places.require(places.NEW_MOUNTS)
    run_ranks(2, lack_proc, str(tmp_path / "store"))


# --- limits ----------------------------------------------------------------------------------------------------------


def lack_address_space(rank: int, n: int, poor: int) -> str:
    comm = par.init()
    comm.barrier()
    if rank == poor:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        used = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    with pytest.raises(par.Error) as raised:
        comm.symmetric_empty(64 << 20, torch.uint8)  # 64 MiB for each rank
    assert raised.value.peers == (() if rank == poor else (poor,))
    return str(raised.value)


@pytest.mark.parametrize("poor", [0, 1])
def test_a_limit_of_address_space_on_one_rank_is_told_to_all(poor: int) -> None:
    for message in run_ranks(3, lack_address_space, poor):
        assert "cannot map 192 MiB" in message
        assert "ulimit -v" in message


def map_nothing(rank: int, n: int, poor: int) -> str:
    if rank == poor:
        places.refuse("mmap", errno.ENOMEM, only=places.SHARED)
    with pytest.raises(par.Error) as raised:
        par.init()
    assert raised.value.peers == (() if rank == poor else (poor,))
    return str(raised.value)


@pytest.mark.parametrize("poor", [0, 1])
def test_a_rank_that_cannot_map_memory_fails_init_on_all(poor: int) -> None:
    places.require_seccomp()
    for message in run_ranks(3, map_nothing, poor):
        assert "cannot map" in message
        assert "Cannot allocate memory" in message


def open_no_more_files(rank: int, n: int) -> str:
    comm = par.init()
    comm.barrier()
    if rank == 1:
        lowest_free = os.dup(0)
        os.close(lowest_free)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    with pytest.raises(par.Error) as raised:
        comm.symmetric_empty(1000)
    return str(raised.value)


def test_a_limit_of_open_files_is_told_to_all() -> None:
    for message in run_ranks(3, open_no_more_files):
        assert "ulimit -n" in message


def pretend_control_group(limit: int, usage: int, cache: int) -> None:
    """Puts a tree in the place of /sys/fs/cgroup in which the group around this process's own has these figures."""
    lines = [line.split(":") for line in Path("/proc/self/cgroup").read_text().splitlines()]
    version_1 = next((path for _, kinds, path in lines if "memory" in kinds), None)
    path = version_1 or next(path for _, kinds, path in lines if not kinds)
    places.enter(places.NEW_MOUNTS)
    places.mount_tmpfs("/sys/fs/cgroup", "1m")
    root = Path("/sys/fs/cgroup/memory" if version_1 else "/sys/fs/cgroup")
    group = (root / path.lstrip("/")).parent if path != "/" else root
    group.mkdir(parents=True, exist_ok=True)
    names = ("limit_in_bytes", "usage_in_bytes", "total_") if version_1 else ("max", "current", "")
    (group / f"memory.{names[0]}").write_text(f"{limit}\n")
    (group / f"memory.{names[1]}").write_text(f"{usage}\n")
    (group / "memory.stat").write_text(
        f"anon 1\n{names[2]}inactive_file {cache // 2}\n{names[2]}active_file {cache // 2}\n"
    )


def live_in_a_control_group(rank: int, n: int, cache: int) -> str:
    mebi = 1 << 20
    pretend_control_group(limit=1000 * mebi, usage=900 * mebi, cache=cache * mebi)
    comm = par.init()
    try:
        comm.symmetric_empty(100 << 20, torch.uint8)  # 200 MiB in all
    except par.Error as error:
        return str(error)
    comm.close()
    return ""


def test_the_limit_of_a_control_group_is_told_before_the_kernel_kills() -> None:
    places.require(places.NEW_MOUNTS)
    for message in run_ranks(2, live_in_a_control_group, 0):
        assert "cannot reserve 200 MiB" in message
        assert "100 MiB are available" in message
        assert "memory limit" in message


def test_page_cache_of_a_control_group_counts_as_free() -> None:
    places.require(places.NEW_MOUNTS)
    assert run_ranks(2, live_in_a_control_group, 400) == ["", ""]


# --- the meeting of the ranks of a host, and strangers at its door ---------------------------------------------------


class Meeting:
    """Ranks as threads that meet under a name and a token, as communicators do after their rendezvous."""

    def __init__(self, n: int, timeout_s: float = 20.0) -> None:
        self.n, self.timeout_s = n, timeout_s
        self.name, self.token = f"pyallreduce-test-{secrets.token_hex(8)}", secrets.token_hex(32)
        self.outcomes: dict[int, Any] = {}
        self._threads: list[threading.Thread] = []

    def start(self, *ranks: int) -> None:
        for rank in ranks:
            thread = threading.Thread(target=self._meet, args=(rank,))
            self._threads.append(thread)
            thread.start()

    def _meet(self, rank: int) -> None:
        try:
            everybody = [100 + r for r in range(self.n)]  # global ranks
            self.outcomes[rank] = _core.Communicator(
                rank, everybody, self.name, self.token, self.timeout_s
            )
        except par.Error as error:
            self.outcomes[rank] = error

    def end(self) -> dict[int, Any]:
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads)
        return self.outcomes

    def connect(self) -> socket.socket:
        """A visitor; returns when rank 0 listens and has room."""
        visitor = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        visitor.settimeout(20)
        while True:
            try:
                visitor.connect(f"\0{self.name}")
                return visitor
            except (ConnectionRefusedError, BlockingIOError):
                time.sleep(0.001)

    def await_rank(self) -> None:
        """Until one has connected, and had the time for its hello."""
        deadline = time.monotonic() + 20
        while Path("/proc/net/unix").read_text().count(f"@{self.name}") < 2:  # the first listens
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)

    def hello(
        self, rank: int, token: str | None = None, size: int | None = None, magic: int = 0x70796172
    ) -> bytes:
        """HostLink::Hello"""
        pid_of_nobody_here, unknown_namespace = 0, 0
        process = struct.pack("=i4xQ", pid_of_nobody_here, unknown_namespace)
        who = struct.pack("=Iii4x", magic, rank, self.n if size is None else size)
        return who + process + (self.token if token is None else token).encode()


@pytest.fixture
def lifeline() -> Iterator[int]:
    """The reading end of a pipe that does not hang up."""
    reading, writing = os.pipe()
    yield reading
    os.close(reading)
    os.close(writing)


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_strangers_at_the_socket_do_no_harm(lifeline: int) -> None:
    meeting = Meeting(2)
    before = num_descriptors()
    with ExitStack() as visitors:
        meeting.start(0)
        good = meeting.hello(1)
        for words in (
            b"\0" * len(good),
            os.urandom(len(good)),
            good[:-1],
            good + b"x",
            os.urandom(100_000),
            b"",
            meeting.hello(1, token="0" * 64),
            meeting.hello(1, magic=0),
            meeting.hello(0),
            meeting.hello(2),
            meeting.hello(-1),
            meeting.hello(2**31 - 1),
            meeting.hello(1, size=3),
        ):
            visitor = visitors.enter_context(meeting.connect())
            socket.send_fds(visitor, [words], [lifeline] * 5)
            assert visitor.recv(1) == b"", words[:20]  # shown the door
        meeting.connect().close()
        for _ in range(400):  # more than rank 0 listens to at a time
            visitors.enter_context(meeting.connect())
        meeting.start(1)
        outcomes = meeting.end()
        assert not any(isinstance(outcome, par.Error) for outcome in outcomes.values()), outcomes
        outcomes.clear()
    assert num_descriptors() == before


def test_ranks_that_do_not_come_are_named_on_all_that_did() -> None:
    meeting = Meeting(4, timeout_s=0.5)
    meeting.start(0, 2)
    outcomes = meeting.end()
    for rank in (0, 2):
        assert isinstance(outcomes[rank], par.TimeoutError), outcomes
        assert outcomes[rank].peers == (101, 103)


def test_a_missing_local_rank_0_is_named() -> None:
    meeting = Meeting(3, timeout_s=0.5)
    meeting.start(1, 2)
    for outcome in meeting.end().values():
        assert isinstance(outcome, par.TimeoutError)
        assert outcome.peers == (100,)
        assert "network namespace" in str(outcome)


def test_a_rank_that_ends_while_others_are_awaited_is_named_at_once(lifeline: int) -> None:
    meeting = Meeting(4)  # its 20 s do not pass: rank 3 never comes
    meeting.start(0, 2)
    meeting.await_rank()  # or rank 0 would be gone before rank 2 looks for it
    with meeting.connect() as rank_1:
        socket.send_fds(rank_1, [meeting.hello(1)], [lifeline])
    for outcome in meeting.end().values():
        assert isinstance(outcome, par.PeerError)
        assert outcome.peers == (101,)


def test_local_rank_0_waits_for_ranks_that_read_late(lifeline: int) -> None:
    n = 150  # more words of welcome for each than its socket holds
    meeting = Meeting(n)
    meeting.start(0)
    with ExitStack() as everybody:
        others = [everybody.enter_context(meeting.connect()) for _ in range(1, n)]
        for rank, other in enumerate(others, 1):
            socket.send_fds(other, [meeting.hello(rank)], [lifeline])
        others[0].recv(1, socket.MSG_PEEK)  # the welcome has begun
        time.sleep(0.3)
        message_bytes = 0
        for _ in range(n - 1):
            for other in others:
                word, descriptors, _, _ = socket.recv_fds(other, 1 << 16, 8)
                message_bytes = len(word)
                assert len(descriptors) == 1
                os.close(descriptors[0])
        segments = [socket.recv_fds(other, 1 << 16, 8)[1] for other in others]
        assert all(len(descriptors) == 1 for descriptors in segments)
        for other, (descriptor,) in zip(others, segments, strict=True):
            os.close(descriptor)
            other.send(b"\0" * message_bytes)  # no problem: mapped
        assert all(other.recv(1 << 16) == b"\0" * message_bytes for other in others)
        outcome = meeting.end()[0]
    assert isinstance(outcome, _core.Communicator), outcome
