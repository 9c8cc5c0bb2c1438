"""Who communicates in ``pyallreduce bench``: this library, or gloo."""

from __future__ import annotations

from datetime import timedelta
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist

from pyallreduce import rendezvous
from pyallreduce._core import read_env
from pyallreduce.communicator import init
from pyallreduce.launch import Launch


class Backend(Protocol):
    """Collectives over the ranks that were started."""

    rank: int
    size: int
    symmetric: bool  # has memory that collectives use without copying

    def empty(self, nbytes: int, symmetric: bool) -> torch.Tensor: ...
    def all_reduce(self, data: torch.Tensor, op: str) -> object: ...
    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor, op: str) -> object: ...
    def all_gather(self, output: torch.Tensor, input: torch.Tensor) -> object: ...
    def broadcast(self, data: torch.Tensor, root: int) -> object: ...
    def barrier(self) -> object: ...
    def close(self) -> None: ...


class Ours:
    symmetric = True

    def __init__(self, timeout_s: float | None) -> None:
        self._comm = init(timeout_s)
        self.rank, self.size = self._comm.rank, self._comm.size
        self.all_reduce, self.reduce_scatter = self._comm.all_reduce, self._comm.reduce_scatter
        self.all_gather, self.broadcast = self._comm.all_gather, self._comm.broadcast
        self.barrier, self.close = self._comm.barrier, self._comm.close

    def empty(self, nbytes: int, symmetric: bool) -> torch.Tensor:
        if symmetric:
            return self._comm.symmetric_empty(nbytes, torch.uint8)
        return torch.empty(nbytes, dtype=torch.uint8)


class Gloo:
    symmetric = False
    OPS: ClassVar = {
        "sum": dist.ReduceOp.SUM,
        "prod": dist.ReduceOp.PRODUCT,
        "max": dist.ReduceOp.MAX,
        "min": dist.ReduceOp.MIN,
        "avg": dist.ReduceOp.AVG,
    }

    def __init__(self, found: Launch, timeout_s: float | None) -> None:
        timeout_s = timeout_s or read_env()["timeout_s"]
        self.rank, self.size = found.rank, found.size
        store = dist.HashStore() if found.size == 1 else rendezvous.open_store(found, timeout_s)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=found.rank,
            world_size=found.size,
            timeout=timedelta(seconds=timeout_s),
        )
        self.barrier, self.close = dist.barrier, dist.destroy_process_group
        self.broadcast, self.all_gather = dist.broadcast, dist.all_gather_into_tensor

    def empty(self, nbytes: int, symmetric: bool) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def all_reduce(self, data: torch.Tensor, op: str) -> object:
        return dist.all_reduce(data, self.OPS[op])

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor, op: str) -> object:
        return dist.reduce_scatter_tensor(output, input, self.OPS[op])


def make_backend(name: str, found: Launch, timeout_s: float | None) -> Backend:
    """``timeout_s``: None for the default of init(). Collective."""
    return Gloo(found, timeout_s) if name == "gloo" else Ours(timeout_s)


def gather(backend: Backend, row: torch.Tensor) -> torch.Tensor:
    """Every rank's ``row``, in rank order."""
    rows = torch.empty(backend.size * row.numel(), dtype=row.dtype)
    backend.all_gather(rows, row)
    return rows.view(backend.size, -1)
