"""Communicator: the collectives of a set of ranks, and init(), which makes one."""

from __future__ import annotations

import atexit
import collections
import os
import threading
import time
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.graph import increment_version

from pyallreduce import _core, gpu, launch, rendezvous
from pyallreduce._buffer import DTYPES, check_disjoint, op_of, span_of
from pyallreduce.errors import UsageError

_open: weakref.WeakSet[Communicator] = weakref.WeakSet()
_implicit: weakref.ref[Communicator] | None = None


def init(
    timeout_s: float | None = None,
    *,
    store: dist.Store | None = None,
    rank: int | None = None,
    size: int | None = None,
) -> Communicator:
    """Makes the communicator of all ranks that the launcher started, or of those that share ``store``.

    Without ``store``: the ranks of torch.distributed's default process group, if there is one; else torchrun, mpirun
    (mpi4py) and srun are recognised by their environment; a process that none of them started is the only rank. May
    be called once per process until that communicator is closed.
    With ``store``, ``rank`` and ``size``: a communicator over any torch store, any number of times; ranks of different
    subsets need different prefixes (``dist.PrefixStore``).

    ``timeout_s``: seconds that this call and every later collective may wait for a peer (default 60, or
    PYALLREDUCE_TIMEOUT_S). Collective. Raises UsageError, TimeoutError (with the ranks that did not come),
    MismatchError, PeerError.
    """
    global _implicit
    settings = _core.read_env()
    if settings["isa"] and not _core.select_isa(settings["isa"]):
        raise UsageError(
            f"PYALLREDUCE_ISA={settings['isa']}: this CPU offers {', '.join(_core.kernels.isas())}"
        )
    if timeout_s is None:
        timeout_s = settings["timeout_s"]
    if not 0 < timeout_s < float("inf"):
        raise UsageError(f"timeout_s is {timeout_s}; a positive number of seconds is needed")
    given = [name for name, value in (("rank", rank), ("size", size)) if value is not None]
    if store is not None:
        if rank is None or size is None or not 0 <= rank < size:
            raise UsageError(
                f"init(store=..., rank={rank}, size={size}): rank and size are needed, 0 <= rank < size"
            )
        return Communicator(rank, size, rendezvous.meet(store, rank, size, timeout_s), timeout_s)
    if given:
        raise UsageError(f"init({', '.join(given)}) also needs store=; or give none of the three")
    if _implicit is not None and (existing := _implicit()) is not None and not existing.closed:
        raise UsageError(
            "init() was called before in this process; use that communicator, close() it first, "
            "or pass store=, rank=, size="
        )
    found = rendezvous.launch_of_process_group() or launch.detect(os.environ, settings["port"])
    if found.size == 1:
        comm = Communicator(0, 1, rendezvous.ALONE, timeout_s)
    else:
        found_store = rendezvous.open_store(found, timeout_s)
        roster = rendezvous.meet(found_store, found.rank, found.size, timeout_s)
        comm = Communicator(found.rank, found.size, roster, timeout_s)
    _implicit = weakref.ref(comm)
    return comm


class Work:
    """A collective on its way. The communicator keeps its tensors alive until it is finished."""

    def __init__(self, work: _core.Work) -> None:
        self._work = work

    def wait(self) -> None:
        """Returns when the result is in the tensor; raises what the collective raised.

        Of a CUDA tensor: returns when all ranks have launched it. What the current stream does later waits for it, on
        the device. An error that comes after that is raised by the next call.
        """
        self._work.wait()

    def done(self) -> bool:
        return self._work.done()


class _DeviceWork(Work):
    def __init__(self, work: _core.DeviceWork, where: gpu.Gpu) -> None:
        self._on_device, self._gpu = work, where

    def wait(self) -> None:
        self._on_device.wait(self._gpu.stream())
        self._gpu.settle()

    def done(self) -> bool:
        return self._on_device.done()


class Communicator:
    """The ranks 0..size-1 and their collectives. All ranks make the same calls in the same order.

    Tensors: dense (channels_last too), on the CPU or on this rank's GPU; float64, float32, bfloat16, float16, int64,
    int32, uint8; any number of elements, zero included. Results are bitwise equal on all ranks. Errors: PeerError,
    TimeoutError, MismatchError, after which the communicator cannot be used; UsageError, after which it can.

    CUDA tensors go through NCCL, found at run time, on a stream of the communicator's own: after what the current
    stream has queued, before what it queues later; the host waits for the other hosts only. One GPU per rank. NCCL
    chooses the order of summation and rounds 16-bit floats in its own way; ``avg`` multiplies its sum by 1/size. While
    the current stream is captured into a CUDA graph: UsageError, since a replay would not ask the hosts.
    """

    def __init__(self, rank: int, size: int, roster: rendezvous.Roster, timeout_s: float) -> None:
        self.rank, self.size = rank, size
        self.local_rank = roster.node_ranks.index(rank)
        self.local_size = len(roster.node_ranks)
        self.node_rank, self.num_nodes = roster.node_rank, roster.num_nodes
        self.timeout_s = timeout_s
        self._core: _core.Communicator | None = _core.Communicator(
            self.local_rank, list(roster.node_ranks), roster.socket_name, roster.token, timeout_s
        )
        self._device: _core.Device | None = None
        # After the two: they must go first, since the worker may still use what is in flight.
        self._in_flight: collections.deque[tuple[_core.Work | _core.DeviceWork, tuple[object, ...]]]
        self._in_flight = collections.deque()
        self._lock = threading.Lock()
        self.closed = False
        _open.add(self)

    def __repr__(self) -> str:
        state = "unattached" if self._core is None else "closed" if self.closed else "open"
        return f"<Communicator rank {self.rank} of {self.size}, {state}>"

    # A DDP hook's state is pickled with the module (torch.save(ddp)).
    def __getstate__(self) -> dict[str, Any]:
        return {"rank": self.rank, "size": self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _core=None, _device=None, closed=True)

    @property
    def core(self) -> _core.Communicator:
        if self._core is None:
            raise UsageError(
                "this communicator came out of a pickle and is attached to nothing; make one with pyallreduce.init()"
            )
        return self._core

    def on_device(self, where: gpu.Gpu) -> _core.Device:
        """The half that works on the rank's GPU; opened at the first call."""
        if self._device is None:
            self._device = where.open(self.core)
        if self._device.index != where.index:
            raise UsageError(
                f"a tensor is on {where}, this communicator works on cuda:{self._device.index}: one GPU per rank "
                "(torch.cuda.set_device(local_rank))"
            )
        return self._device

    def _half_of(self, tensor: torch.Tensor) -> tuple[Any, tuple[int, ...]]:
        """What runs its collectives, and what it needs to know besides: on a device, the caller's stream."""
        where = gpu.of(tensor)
        if where is None:
            return self.core, ()
        return self.on_device(where), (where.stream(),)

    def _finish(
        self,
        work: Any,  # of the half that works on `changed`
        changed: torch.Tensor,
        *read: torch.Tensor,
    ) -> Work | None:
        increment_version(changed)  # autograd must notice that a saved tensor was written
        where = gpu.of(changed)
        if work is None:
            if where is not None:
                where.settle()
            return None
        self.keep_alive(work, changed, *read)
        return Work(work) if where is None else _DeviceWork(work, where)

    def keep_alive(self, work: _core.Work | _core.DeviceWork, *used: object) -> None:
        """Holds the memory of an asynchronous call until it is done, also if its caller lets go of everything."""
        with self._lock:
            while self._in_flight and self._in_flight[0][0].done():
                self._in_flight.popleft()
            self._in_flight.append((work, used))

    def all_reduce(
        self, tensor: torch.Tensor, op: str = "sum", async_op: bool = False
    ) -> Work | None:
        """Replaces ``tensor`` on every rank by the sum (avg, prod, min, max) over all ranks' tensors.

        The order of summation is the rank order; 16-bit floats are summed in float32 and rounded once; ``avg`` is the
        sum x 1/size before that rounding. ``async_op``: returns a Work at once; wait() it before using the tensor.
        """
        address, numel, dtype, layout = span_of(tensor)
        half, where = self._half_of(tensor)
        work = half.all_reduce(
            address, numel, dtype, op_of(op, tensor.dtype), layout, async_op, *where
        )
        return self._finish(work, tensor)

    def reduce_scatter(
        self, output: torch.Tensor, input: torch.Tensor, op: str = "sum", async_op: bool = False
    ) -> Work | None:
        """Shard ``rank`` of the reduction of all ranks' ``input`` goes to ``output``; input has size x its elements."""
        to, source = self._two_addresses(output, input)
        numel, needed = input.numel(), self.size * output.numel()
        if numel != needed:
            raise UsageError(
                f"input has {numel} elements, output {output.numel()}; "
                f"input needs size x output = {needed}"
            )
        half, where = self._half_of(output)
        work = half.reduce_scatter(
            to,
            source,
            output.numel(),
            DTYPES[input.dtype],
            op_of(op, input.dtype),
            async_op,
            *where,
        )
        return self._finish(work, output, input)

    def all_gather(
        self, output: torch.Tensor, input: torch.Tensor, async_op: bool = False
    ) -> Work | None:
        """Writes all ranks' ``input``, in rank order, to ``output``; output has size x its elements."""
        to, source = self._two_addresses(output, input)
        numel, needed = output.numel(), self.size * input.numel()
        if numel != needed:
            raise UsageError(
                f"output has {numel} elements, input {input.numel()}; "
                f"output needs size x input = {needed}"
            )
        half, where = self._half_of(output)
        work = half.all_gather(to, source, input.numel(), DTYPES[input.dtype], async_op, *where)
        return self._finish(work, output, input)

    def broadcast(self, tensor: torch.Tensor, root: int = 0, async_op: bool = False) -> Work | None:
        """Copies ``tensor`` of rank ``root`` to all ranks."""
        address, numel, dtype, layout = span_of(tensor)
        if not isinstance(root, int) or not 0 <= root < self.size:
            raise UsageError(f"root is {root!r}; a rank from 0 to {self.size - 1} is needed")
        half, where = self._half_of(tensor)
        work = half.broadcast(address, numel, dtype, root, layout, async_op, *where)
        return self._finish(work, tensor)

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        self.core.barrier(0)

    def symmetric_empty(self, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A one-dimensional tensor that collectives use without copying. Collective over the ranks of a host.

        Also contiguous slices of it, at equal offsets on all ranks, are used in place. Contents are undefined; the
        memory (numel x itemsize bytes per rank, shared by the host's processes) lives until the tensor dies. A forked
        child sees its parent's memory, not a copy: it may read, as a DataLoader worker that uses the model.
        """
        return self._allocate(numel, dtype, one_copy=False)

    def _allocate(self, numel: int, dtype: torch.dtype, one_copy: bool) -> torch.Tensor:
        """``one_copy``: all ranks of the host see the same memory."""
        if not isinstance(numel, int) or numel < 0:
            raise UsageError(f"numel is {numel!r}; a whole number >= 0 is needed")
        if dtype not in DTYPES:
            accepted = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
            raise UsageError(f"dtype is {dtype}; accepted are {accepted}")
        part = self.core.allocate(numel, DTYPES[dtype], one_copy)
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(memoryview(part), dtype=dtype)

    def close(self) -> None:
        """Leaves the communicator: local, idempotent, at most 1 s. Peers see an error only if they still need us."""
        if self._core is not None and not self.closed:
            self.closed = True
            self._core.close()

    def _two_addresses(self, output: torch.Tensor, input: torch.Tensor) -> tuple[int, int]:
        to, *_ = span_of(output, "output", contiguous=True)
        source, *_ = span_of(input, "input", contiguous=True)
        if output.dtype != input.dtype:
            raise UsageError(
                f"output has dtype {output.dtype}, input {input.dtype}; they must agree"
            )
        if output.device != input.device:
            raise UsageError(
                f"output is on {output.device}, input on {input.device}; they must agree"
            )
        check_disjoint(output, input)
        return to, source


def _close_all() -> None:
    for comm in list(_open):
        comm.close()
    # Their calls end now. Threads that nobody joins must be back in Python when the interpreter ends: it ends them as
    # they ask for the GIL, which C++ code does not survive.
    give_up_at = time.monotonic() + 1.0
    while _core.num_callers() > 0 and time.monotonic() < give_up_at:
        time.sleep(0.001)


atexit.register(_close_all)
os.register_at_fork(after_in_child=_core.forget_callers)
