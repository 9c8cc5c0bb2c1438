"""Communication hooks for DistributedDataParallel: ``ddp.register_comm_hook(comm, par.allreduce_hook)``.

DDP calls a hook on the thread that runs backward, once per bucket and in the same order on all ranks; it does not
divide by the number of ranks, so the hook averages. A future is completed by a thread of the communicator's own, never
by the core's worker, which does not touch Python. On a GPU it is complete once its collective has been launched, and
holds back the streams of those who wait for it.
"""

# No postponed annotations: DDP compares those of a hook with its own types.
import atexit
import gc
import queue
import threading
import warnings
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Variable
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from pyallreduce import gpu
from pyallreduce.communicator import Communicator, Work
from pyallreduce.errors import UsageError


class _Completer:
    """Waits for collectives in order and completes their futures. Its thread ends with the communicator."""

    def __init__(self, comm: Communicator) -> None:
        self._queue: queue.SimpleQueue[
            tuple[Work, Future[Any], torch.Tensor, AbstractContextManager[Any]] | None
        ]
        self._queue = queue.SimpleQueue()
        weakref.finalize(comm, self._queue.put, None)
        self._thread = threading.Thread(target=self._run, name="pyallreduce-futures", daemon=True)
        self._thread.start()

    def complete(self, work: Work, result: torch.Tensor) -> Future[Any]:
        where = gpu.of(result)
        future: Future[Any] = Future() if where is None else where.future()
        current = nullcontext() if where is None else where.aside()
        self._queue.put((work, future, result, current))
        return future

    def end(self) -> None:
        """Of the communicator's calls, all have ended."""
        self._queue.put(None)
        self._thread.join(1.0)

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            work, future, result, stream = item
            with stream:
                try:
                    work.wait()
                except Exception as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
            del item, work, future, result  # do not keep the last bucket alive while idle


_completers: weakref.WeakKeyDictionary[Communicator, _Completer] = weakref.WeakKeyDictionary()


def _end_all() -> None:
    """Before the interpreter ends: it would end the threads as they ask for the GIL, in the middle of torch's C++."""
    for comm, completer in list(_completers.items()):
        comm.close()
        completer.end()


atexit.register(_end_all)


def allreduce_hook(state: Communicator, bucket: dist.GradBucket) -> Future[torch.Tensor]:
    """Averages the bucket over the ranks of ``state``; overlaps with the rest of backward.

    Errors of the collective are raised by ``backward()`` with their own type.
    """
    return _averaged(state, bucket.buffer())


def bf16_compress_hook(state: Communicator, bucket: dist.GradBucket) -> Future[torch.Tensor]:
    """As allreduce_hook, with bfloat16 on the way: half the bytes; summed in float32, rounded once."""
    return _compressed(state, bucket.buffer(), torch.bfloat16)


def fp16_compress_hook(state: Communicator, bucket: dist.GradBucket) -> Future[torch.Tensor]:
    """As bf16_compress_hook with float16; gradients beyond 65504 become inf."""
    return _compressed(state, bucket.buffer(), torch.float16)


def _compressed(
    comm: Communicator, grads: torch.Tensor, dtype: torch.dtype
) -> Future[torch.Tensor]:
    compressed = grads.to(dtype)

    def decompress(future: Future[torch.Tensor]) -> torch.Tensor:
        return grads.copy_(future.value())

    return _averaged(comm, compressed).then(decompress)


def _averaged(comm: Communicator, grads: torch.Tensor) -> Future[Any]:
    completer = _completers.get(comm)
    if completer is None:
        _check_ddp(comm)
        completer = _completers[comm] = _Completer(comm)
    where = gpu.of(grads)
    # Where our kernels are not compiled in, torch divides.
    divides = where is None or comm.on_device(where).has_kernels
    work = comm.all_reduce(grads, op="avg" if divides else "sum", async_op=True)
    assert work is not None
    if torch._C._current_graph_task_id() != -1:  # in Join, hooks run outside of backward
        # At the end of backward, before DDP looks at the futures: these would turn an error into a RuntimeError.
        Variable._execution_engine.queue_callback(work.wait)
    averaged = completer.complete(work, grads)
    return averaged if divides else averaged.then(lambda f: f.value().div_(comm.size))


def _check_ddp(comm: Communicator) -> None:
    """Once, at the first bucket: DDP's ranks must be ours, and the modes in which DDP itself is wrong get a warning."""
    for ddp in (o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)):
        if not any(state is comm for _, state in getattr(ddp, "_comm_hooks", ())):
            continue
        group = ddp.process_group
        if (group.rank(), group.size()) != (comm.rank, comm.size):
            raise UsageError(
                f"DDP's process group has rank {group.rank()} of {group.size()}, the communicator rank {comm.rank} of "
                f"{comm.size}; the hook would average over other ranks than DDP trains"
            )
        if ddp.static_graph:
            warnings.warn(
                "DDP(static_graph=True) together with no_sync() fails or silently stops reducing in PyTorch itself "
                "(pytorch#187732); use GradientAggregator if you accumulate gradients",
                stacklevel=2,
            )
