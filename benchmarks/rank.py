"""One rank of a set: ``python -m benchmarks.rank SOCKET KIND FOLDER``, started by benchmarks/peers.py.

It does what the coordinator asks for over the socket, one function call at a time, and is otherwise blocked in a read:
an idle set costs the one that measures nothing, also where a library's own waits would spin.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_S = 120.0


@dataclass
class Rank:
    """Who this process is; the first argument of every function that a coordinator calls."""

    rank: int
    size: int
    library: str
    comm: Any  # pyallreduce.Communicator beside an initialised torch.distributed, or mpi4py's world
    kept: dict[str, Any] = field(default_factory=dict)  # between calls


def join_torch(folder: str) -> Rank:
    """Ours and gloo in one process: torch.distributed's default group is gloo."""
    import torch
    import torch.distributed as dist

    import pyallreduce as par

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(
        "gloo", f"file://{folder}/gloo", rank=rank, world_size=size, timeout=timeout
    )
    comm = par.init(TIMEOUT_S, store=dist.FileStore(f"{folder}/store", size), rank=rank, size=size)
    return Rank(rank, size, f"torch {torch.__version__}", comm)


def join_mpi(folder: str) -> Rank:
    # With mpi4py's default, MPI_THREAD_MULTIPLE. MPICH without: 4 KiB in 3 instead of 6 us, but 25 MiB in 22 instead of
    # 6 ms and, with more ranks than cores, in 25 s, since its waits then keep their core.
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    version = MPI.Get_library_version().splitlines()[0].strip("\0 ")
    name = " ".join(version.replace("Version:", "").split(",")[0].split())
    return Rank(world.Get_rank(), world.Get_size(), name, world)


JOIN = {"torch": join_torch, "mpi": join_mpi}


def serve(connection: Connection, rank: Rank) -> None:
    """Until the coordinator says None, or is gone."""
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if request is None:
            return
        function, arguments = request
        try:
            answer = (True, function(rank, *arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        connection.send(answer)


def main() -> None:
    address, kind, folder = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
        connection = Connection(client.detach())
    rank = JOIN[kind](folder)
    connection.send((True, (rank.rank, os.getpid(), rank.library)))
    serve(connection, rank)
    if kind == "torch":
        import torch.distributed as dist

        rank.kept.clear()
        rank.comm.close()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
