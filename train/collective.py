"""What only rank 0 can do, a file for one: every rank gets its answer, or its refusal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import pyallreduce as par

_ANSWER, _USAGE, _FAILURE = range(3)


class Failure(RuntimeError):
    """Something the run cannot go on without; the same words on every rank, so one can say them."""


def by_rank_0(comm: par.Communicator, action: Callable[[], bytes | None]) -> bytes:
    """Collective: what `action` returns on rank 0, which alone runs it; nothing is b"".

    A UsageError or Failure that it raises is raised on every rank. Whatever else it raises ends
    rank 0, and so the others.
    """
    head, payload = torch.zeros(2, dtype=torch.int64), b""
    if comm.rank == 0:
        kind, payload = _outcome(action)
        head = torch.tensor([kind, len(payload)])
    comm.broadcast(head, root=0)
    kind, length = head.tolist()
    payload = _broadcast(payload, length, comm)
    if kind == _USAGE:
        raise par.UsageError(payload.decode())
    if kind == _FAILURE:
        raise Failure(payload.decode())
    return payload


def _outcome(action: Callable[[], bytes | None]) -> tuple[int, bytes]:
    try:
        return _ANSWER, action() or b""
    except par.UsageError as error:
        return _USAGE, str(error).encode()
    except Failure as error:
        return _FAILURE, str(error).encode()


def _broadcast(payload: bytes, length: int, comm: par.Communicator) -> bytes:
    if not length:
        return b""
    data: Tensor = (
        torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        if comm.rank == 0
        else torch.empty(length, dtype=torch.uint8)
    )
    comm.broadcast(data, root=0)
    return data.numpy().tobytes()
