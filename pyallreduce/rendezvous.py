"""How the ranks of a communicator find each other: a torch store, met once, when the communicator is made."""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import stat
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pyallreduce._core import __version__
from pyallreduce.errors import Error, MismatchError, PeerError, TimeoutError, UsageError
from pyallreduce.launch import Launch


@dataclass(frozen=True)
class Roster:
    """What all ranks know after the rendezvous."""

    token: str  # secret of this communicator, 64 characters
    node_ranks: tuple[int, ...]  # the global ranks of my node, ascending
    node_rank: int
    num_nodes: int

    @property
    def socket_name(self) -> str:
        """Abstract unix socket of my node's ranks: unguessable, gone with its last holder."""
        return f"pyallreduce-{self.token[:32]}-{self.node_ranks[0]}"


LINGER_S = 2.0
MPI_TAG = 0x7079
_sent: list[Any] = []  # MPI requests of rank 0, whose buffers must live until they are delivered
# Kept for the process's life: rank 0 can listen on the port only once, and later communicators meet there again.
_stores: dict[Launch, dist.TCPStore] = {}
_inherited: list[
    dist.TCPStore
] = []  # of a forked child; not destroyed: their threads are the parent's
ALONE = Roster(token="", node_ranks=(0,), node_rank=0, num_nodes=1)


def launch_of_process_group() -> Launch | None:
    """Who this process is by torch.distributed, however its process group was made; None if there is none."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    return Launch("torch.distributed", dist.get_rank(), dist.get_world_size())


def open_store(launch: Launch, timeout_s: float) -> dist.Store:
    """The store of the launcher: torch's own if a process group exists, torchrun's, or one on a port of ours."""
    if launch.launcher == "torch.distributed":
        return dist.PrefixStore("pyallreduce", dist.distributed_c10d._get_default_store())
    if launch not in _stores:
        open_one = _store_by_mpi if launch.launcher == "mpirun" else _tcp_store
        _stores[launch] = open_one(launch, timeout_s)
    return dist.PrefixStore("pyallreduce", _stores[launch])


def _tcp_store(launch: Launch, timeout_s: float) -> dist.TCPStore:
    hosts_it = launch.rank == 0 and not launch.agent_store
    if not hosts_it:
        _wait_for_listener(launch, timeout_s)
    try:
        return dist.TCPStore(
            launch.address,
            launch.port,
            launch.size,
            is_master=hosts_it,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except dist.DistNetworkError as error:
        if hosts_it:
            raise Error(
                f"rank 0 cannot listen on port {launch.port} for the rendezvous ({error}). "
                "Another job may use it: set PYALLREDUCE_PORT to a free port, equal on all ranks"
            ) from error
        raise _unreachable(launch, timeout_s) from error


def _wait_for_listener(launch: Launch, timeout_s: float) -> None:
    """Torch's store waits, too, but deaf to Ctrl-C."""

    def listens() -> bool:
        with (
            suppress(OSError),
            socket.create_connection((launch.address, launch.port), 1.0) as ours,
        ):
            if ours.getsockname() != ours.getpeername():
                return True
            # On this host, while nobody listens, TCP joins a socket that was given that very port with itself.
            # Closed by a reset: the port would else be taken for a minute, and rank 0 could not listen.
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    if not _wait_until(listens, time.monotonic() + timeout_s):
        raise _unreachable(launch, timeout_s)


def _unreachable(launch: Launch, timeout_s: float) -> TimeoutError:
    return TimeoutError(
        f"rank {launch.rank} could not reach rank 0 at {launch.address}:{launch.port} within "
        f"{timeout_s} s. Has rank 0 called init()? Is MASTER_ADDR right?",
        (0,),
    )


def _leave_stores_to_parent() -> None:
    """In a forked child: an orphan must not keep the port of a rendezvous, and nobody speaks over the parent's
    connections. /dev/null takes the sockets' numbers, which the stores will close, if anything ever does."""
    ports = {store.port for launch, store in _stores.items() if not launch.agent_store}
    _inherited.extend(_stores.values())
    _stores.clear()
    sockets = [fd for fd in _open_sockets() if _ports_of(fd) & ports] if ports else []
    if sockets:
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in sockets:
            os.dup2(nothing, fd, inheritable=False)
        os.close(nothing)


os.register_at_fork(after_in_child=_leave_stores_to_parent)


def _open_sockets() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the listing itself
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.append(int(name))
    return found


def _ports_of(fd: int) -> set[int]:
    """TCP ports at both ends of a socket."""
    ports = set()
    with socket.socket(fileno=os.dup(fd)) as copy:
        if copy.family in (socket.AF_INET, socket.AF_INET6):
            for name_of_end in (copy.getsockname, copy.getpeername):
                with suppress(OSError):  # a listener has no peer
                    ports.add(name_of_end()[1])
    return ports


def _store_by_mpi(launch: Launch, timeout_s: float) -> dist.TCPStore:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UsageError(
            "started by mpirun, but mpi4py cannot be imported; pip install 'pyallreduce[mpi]', or start with torchrun"
        ) from error
    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (launch.rank, launch.size):
        raise UsageError(
            f"mpirun says rank {launch.rank} of {launch.size}, mpi4py says {world.Get_rank()} of {world.Get_size()}: "
            "mpi4py uses another MPI library than this mpirun. Install the one that mpirun belongs to"
        )
    timeout = timedelta(seconds=timeout_s)
    if launch.rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, launch.size, True, timeout, wait_for_workers=False)
        address = (socket.gethostname(), store.port, _node_key())
        # Not a broadcast, which has no deadline; meet() names those who do not come for their message.
        _sent.extend(world.isend(address, dest=r, tag=MPI_TAG) for r in range(1, launch.size))
        return store
    request = world.irecv(source=0, tag=MPI_TAG)
    received: list[Any] = []

    def arrived() -> bool:
        done, message = request.test()
        received[:] = [message]
        return bool(done)

    if not _wait_until(arrived, time.monotonic() + timeout_s):
        request.cancel()
        raise TimeoutError(
            f"rank 0 sent no address for the rendezvous within {timeout_s} s. Has it called init()?",
            (0,),
        )
    host, port, node = received[0]
    host = "127.0.0.1" if node == _node_key() else host
    return dist.TCPStore(host, port, launch.size, False, timeout, wait_for_workers=False)


def meet(store: dist.Store, rank: int, size: int, timeout_s: float) -> Roster:
    """Collective over all ranks. Several communicators may use one store; those over different sets of ranks need
    different prefixes (``dist.PrefixStore``), as with torch's own groups."""
    mine = {
        "token": secrets.token_hex(32),
        "node": _node_key(),
        "size": size,
        "version": __version__,
    }
    # The how-manyeth communicator of this rank over this store: equal on all ranks, so old keys are never read.
    prefix = f"communicator/{store.add(f'joins/{rank}', 1)}"
    store.set(f"{prefix}/{rank}", json.dumps(mine))
    keys = [f"{prefix}/{r}" for r in range(size)]
    try:
        _wait_for(store, keys, timeout_s)
        records = [_record(store.get(key)) for key in keys]
    except dist.DistNetworkError as error:
        raise PeerError(
            f"the store of the rendezvous is gone ({error}); rank 0 or the launcher, who host it, have ended",
            (0,),
        ) from error

    store.add(f"{prefix}/read", 1)
    if (problem := _disagreement(records)) is not None:
        if rank == 0:  # which may host the store: it must not end before the others have read why
            _wait_until(lambda: store.add(f"{prefix}/read", 0) >= size, time.monotonic() + LINGER_S)
        raise problem
    nodes = list(dict.fromkeys(record["node"] for record in records))
    node = mine["node"]
    return Roster(
        token=records[0]["token"],
        node_ranks=tuple(r for r in range(size) if records[r]["node"] == node),
        node_rank=nodes.index(node),
        num_nodes=len(nodes),
    )


def _record(payload: bytes) -> dict[str, Any]:
    """What a rank has written to the store; empty if it is no record. Another process wrote it: checked before use."""
    try:
        record = json.loads(payload)
    except (ValueError, RecursionError):
        return {}
    fields = {"token": str, "node": str, "size": int, "version": str}
    if not isinstance(record, dict) or any(type(record.get(f)) is not t for f, t in fields.items()):
        return {}
    return record if re.fullmatch("[0-9a-f]{64}", record["token"]) else {}


def _disagreement(records: list[dict[str, Any]]) -> Error | None:
    if strange := [r for r, record in enumerate(records) if not record]:
        return MismatchError(
            f"rank {strange[0]} wrote no record of this version of pyallreduce ({__version__}) to the store of the "
            "rendezvous. Has it another version? Does another program use the store?",
            strange,
        )
    for field in ("size", "version"):
        odd = [r for r, record in enumerate(records) if record[field] != records[0][field]]
        if odd:
            return MismatchError(
                f"rank 0 has {field} {records[0][field]}, rank {odd[0]} has {records[odd[0]][field]}",
                odd,
            )
    elsewhere = [r for r, record in enumerate(records) if record["node"] != records[0]["node"]]
    if elsewhere:
        return UsageError(_apart(elsewhere[0], records[0]["node"], records[elsewhere[0]]["node"]))
    return None


def _apart(rank: int, node_of_0: str, node: str) -> str:
    if node_of_0.split("/")[0] == node.split("/")[0]:
        return (
            f"ranks 0 and {rank} run on one host, but in different network namespaces (containers?), across which "
            "they cannot hand over shared memory. Give the containers a common one: docker run --network=host or "
            "--network=container:NAME; one pod in Kubernetes"
        )
    return f"ranks 0 and {rank} run on different hosts; communicators over several hosts are planned, not there yet"


def _wait_for(store: dist.Store, keys: list[str], timeout_s: float) -> None:
    if not _wait_until(lambda: store.check(keys), time.monotonic() + timeout_s):
        absent = [r for r, key in enumerate(keys) if not store.check([key])]
        names = ", ".join(map(str, absent))
        raise TimeoutError(
            f"rank(s) {names} did not come to the rendezvous within {timeout_s} s. Do all ranks call init()? "
            "Did they crash before? A longer timeout_s can be given to init()",
            absent,
        )


def _wait_until(ready: Callable[[], bool], deadline: float) -> bool:
    pause_s = 0.0005
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.02)
    return True


def _node_key() -> str:
    """Equal for processes that may share memory. Only a candidate: the hand-over of the segment is the proof."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot_id = file.read().strip()
        return f"{boot_id}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError as error:
        raise Error(
            f"cannot tell which ranks share a host: {error}. Mount /proc, unmasked, where the ranks run"
        ) from error
