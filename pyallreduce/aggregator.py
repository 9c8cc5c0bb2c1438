"""GradientAggregator: layer-wise aggregation that runs while backward still does (paper, section 4).

Autograd tells when a parameter's gradient is complete; when a bucket's last one is, its collective starts on the
communicator's worker. Buckets start in one order, equal on all ranks. An engine callback at the end of backward starts
what is left, and waits.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.autograd import Variable
from torch.autograd.graph import increment_version
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._pytree import tree_leaves

from pyallreduce import _core
from pyallreduce._buffer import DTYPES, OPS, is_dense, span_of
from pyallreduce.buckets import DEFAULT_BUCKET_BYTES, Bucket, Slot, layout_hash, make_buckets
from pyallreduce.communicator import Communicator
from pyallreduce.eager import EagerUpdater, check_optimizer
from pyallreduce.errors import Error, UsageError
from pyallreduce.report import BucketRecord, IterationRecord, summarise


def _no_callback() -> None:
    return None


def _unattached() -> GradientAggregator:
    aggregator = GradientAggregator.__new__(GradientAggregator)
    aggregator.module, aggregator._closed = None, True
    return aggregator


class GradientAggregator:
    """Aggregates a module's gradients over the ranks of ``comm`` during backward. Replaces DDP.

    Broadcasts parameters and buffers from rank 0. When ``backward()`` returns, ``p.grad`` holds the aggregate on every
    rank. ``op="avg"`` divides by the number of ranks, as DDP; ``op="sum"`` is for losses normalised by kn (Remark 3).
    A parameter that no rank has used keeps ``grad is None``; one that some have used counts as zero on the others.
    Gradients live in the buckets: ``zero_grad(set_to_none=False)`` saves a copy per iteration, either kind is right.
    Module buffers (batch-norm statistics) stay per rank after the broadcast. Accumulate under ``no_sync()``; a second
    backward on top of an aggregate is right with ``op="avg"`` only, as in DDP. Parameters unfrozen later are not seen:
    make a new aggregator. Reentrant checkpoints (torch.utils.checkpoint with use_reentrant=True) are aggregated at the
    end of backward, without overlap, and need outputs that are tensors or nested containers of them.

    ``bucket_bytes``: default 25 MiB. ``optimizer``: the one that ends an iteration for ``report()``; found by itself if
    not given. ``update="eager"`` needs a ``par.SGD`` over exactly the trainable parameters: each bucket's reduction
    and update are one pass, during backward; ``p.grad`` is undefined afterwards (zero, in fact) and ``opt.step()``
    only closes the iteration. Collective; raises UsageError, and MismatchError if the ranks' modules differ.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        comm: Communicator,
        op: str = "avg",
        bucket_bytes: int | None = None,
        wire_dtype: torch.dtype | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        update: str = "step",
        share_parameters: bool = False,
        max_norm: float | None = None,
    ) -> None:
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            raise UsageError(
                "the module is wrapped in DDP already; pass the plain module, or use DDP with allreduce_hook"
            )
        if op not in ("avg", "sum"):
            raise UsageError(f"op is {op!r}; gradients can be aggregated by 'avg' or 'sum'")
        if bucket_bytes is not None and (not isinstance(bucket_bytes, int) or bucket_bytes <= 0):
            raise UsageError(f"bucket_bytes is {bucket_bytes!r}; a positive whole number is needed")
        for name, value in (
            ("wire_dtype", wire_dtype),
            ("share_parameters", share_parameters),
            ("max_norm", max_norm),
        ):
            if value is not None and value is not False:
                raise UsageError(f"{name}={value} is planned, not there yet; leave it out")
        if update not in ("step", "eager"):
            raise UsageError(f"update is {update!r}; accepted are 'step' and 'eager'")

        self.module: torch.nn.Module | None = module
        self.comm, self.op = comm, OPS[op]
        self._optimizer = optimizer
        self._buckets = make_buckets(module, bucket_bytes or DEFAULT_BUCKET_BYTES)
        self._slots = [slot for bucket in self._buckets for slot in bucket.slots]
        for slot in self._slots:
            span_of(slot.param.detach().flatten(), f"parameter {slot.name}")  # device and dtype
        sgd = check_optimizer(optimizer, self._buckets) if update == "eager" else None
        self._layout = layout_hash(module, self._buckets, (op, update))
        comm.core.barrier(self._layout)
        self._broadcast(module)
        for bucket in self._buckets:
            bucket.allocate(comm)
        self._updater = EagerUpdater(comm, self._buckets, sgd) if sgd is not None else None

        self._syncs = True  # False inside no_sync()
        self._expects = False  # a forward has run whose gradients are not aggregated yet
        # The engine's callback at the end of backward; gone as soon as a backward has raised.
        self._callback: Callable[[], Callable[[], None] | None] = _no_callback
        self._graph_task = -1  # the outermost backward, of those that run inside each other
        self._begun = False  # gradients have come in a backward that has not ended yet
        self._begun_to_sync = False  # and it is to aggregate them
        self._attempt = 0  # backwards that raised before their end
        self._torn = False
        self._next = 0  # the first bucket whose collective has not started
        self._records: list[BucketRecord] = []  # of started buckets, not yet waited for
        self._count = 0
        self._current: IterationRecord | None = None
        self._last: IterationRecord | None = None
        self._forward_start_s = self._forward_end_s = self._step_start_s = 0.0
        self._handles: list[Any] = self._register_hooks(module)
        self._closed = False

    # --- what users call ---------------------------------------------------------------------------------------

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward inside only accumulates; the first backward outside aggregates all of it."""
        before, self._syncs = self._syncs, False
        try:
            yield
        finally:
            self._syncs = before

    def synchronize(self) -> None:
        """Aggregates what backward has left. Runs by itself at the end of backward; then this does nothing.

        Needed only by a rank that has run a forward but no backward while others have. Collective then.
        """
        self._check_open()
        if not self._expects or not self._syncs:
            return
        while self._next < len(self._buckets):
            self._start(self._buckets[self._next])
        self._wait()

    def report(self) -> dict[str, Any]:
        """What the last finished iteration spent on communication, from this rank's event record. Local, JSON-able.

        Seconds from the first forward to the return of ``step()``; ``overlap_ratio`` is None without communication.
        ``iteration`` counts from 1; 0 while none has finished. Keys: iteration, window_s, compute_s, comm_busy_s,
        exposed_comm_s, overlap_ratio, skew_s, slowest_rank, buckets, phases; definitions in pyallreduce/report.py.
        """
        return summarise(self._last, self.comm.size)

    @property
    def torn(self) -> bool:
        """True if an eager iteration failed half-way: some buckets may be updated, others not."""
        return self._torn or (self._updater is not None and self._next > 0)

    def close(self) -> None:
        """Removes the hooks; gradients stay where they are. Local, idempotent."""
        if self._closed:
            return
        self._closed = True
        for handle in self._handles:
            handle.remove()
        if self._updater is not None:
            self._updater.detach()

    def __reduce__(self) -> Any:
        """The module's hooks take us along into its copies and pickles, which nobody aggregates."""
        return _unattached, ()

    # --- hooks ---------------------------------------------------------------------------------------------------

    def _register_hooks(self, module: torch.nn.Module) -> list[Any]:
        handles: list[Any] = [
            module.register_forward_pre_hook(self._before_forward),
            module.register_forward_hook(self._after_forward),
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        for slot in self._slots:
            hook = functools.partial(self._on_gradient, slot)
            handles.append(slot.param.register_post_accumulate_grad_hook(hook))
        return handles

    def _is_watched(self, module: torch.nn.Module) -> bool:
        """Not a copy, nor evaluation, nor a recomputation inside backward."""
        return (
            module is self.module
            and torch.is_grad_enabled()
            and torch._C._current_graph_task_id() == -1
        )

    def _before_forward(self, module: torch.nn.Module, args: Any) -> None:
        if not self._is_watched(module):
            return
        self._check_open()
        self._abandon_backward()
        now = self._forward_start_s = _core.now_s()
        self._expects = True
        self._open_record(now)

    def _after_forward(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not self._is_watched(module):
            return
        assert self._current is not None
        self._forward_end_s = _core.now_s()
        self._current.add("forward", self._forward_start_s, self._forward_end_s)
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
                leaf.register_hook(self._on_output_gradient)

    def _on_output_gradient(self, grad: torch.Tensor) -> None:
        """The start of the outermost backward, also if all gradients come in reentrant ones inside it."""
        self._enter_backward()

    def _on_gradient(self, slot: Slot, param: torch.Tensor) -> None:
        """On the autograd thread: ``param.grad`` is complete for this backward."""
        self._enter_backward()
        if not self._begun:
            self._begin_backward(param)
        slot.adopt_gradient()
        slot.used = True
        if not self._syncs:
            return
        bucket = slot.bucket
        if bucket.index < self._next:
            raise UsageError(
                f"a second gradient of {slot.name} came in one backward, from a reentrant checkpoint, when the first "
                "was on its way already; pass use_reentrant=False to torch.utils.checkpoint"
            )
        if slot.ready or torch._C._current_graph_task_id() != self._graph_task:
            return  # a reentrant backward's gradient may not be the last one; the end of the outermost is
        slot.ready = True
        bucket.pending -= 1
        if bucket.pending == 0:
            bucket.ready_s = _core.now_s()
            while self._next < len(self._buckets) and self._buckets[self._next].pending == 0:
                self._start(self._buckets[self._next])

    def _enter_backward(self) -> None:
        if self._callback() is not None:
            return
        self._abandon_backward()

        def end_of_backward() -> None:
            self._end_of_backward()

        self._callback = weakref.ref(end_of_backward)
        self._graph_task = torch._C._current_graph_task_id()
        Variable._execution_engine.queue_callback(end_of_backward)

    def _begin_backward(self, param: torch.Tensor) -> None:
        self._check_open()
        if self._updater is not None:
            try:
                self._updater.begin_backward()
            except UsageError:
                param.grad = None  # it was consumed and zero, before autograd added to it just now
                raise
        self._begun, self._begun_to_sync = True, self._syncs
        self._expects = True
        self._backward_start_s = self._forward_end_s or _core.now_s()
        self._open_record(self._backward_start_s)

    def _end_of_backward(self) -> None:
        self._callback = _no_callback
        if not self._begun:  # torch.autograd.grad, for one: it accumulates nothing
            return
        assert self._current is not None
        self._current.add("backward", self._backward_start_s, _core.now_s())
        self._forward_end_s = 0.0
        self.synchronize()
        self._begun = False

    # --- collectives -----------------------------------------------------------------------------------------------

    def _start(self, bucket: Bucket) -> None:
        """Submits the bucket's collective; on the autograd thread, which must not wait."""
        now = _core.now_s()
        with torch.no_grad():
            bucket.announce_use()
        # With the index, so that a rank that has lost a backward is told so and does not mix up buckets.
        layout = (self._layout + self._attempt * len(self._buckets) + bucket.index) % 2**64
        if self._updater is not None:
            work = self._updater.submit(bucket, self.op, layout)
        else:
            address, numel, dtype, _ = span_of(bucket.flat)
            work = self.comm.core.all_reduce(address, numel, dtype, self.op, layout, True)
            self.comm.keep_alive(work, bucket.flat)
        increment_version(bucket.flat)
        names = [slot.name for slot in bucket.slots]
        ready_s = bucket.ready_s if bucket.pending == 0 else now
        self._records.append(BucketRecord(bucket.index, bucket.nbytes, names, ready_s, work))
        self._next += 1

    def _wait(self) -> None:
        wait_start_s = _core.now_s()
        for record in self._records:
            record.used_s = wait_start_s
            record.work.wait()
        if self._updater is None:
            with torch.no_grad():
                for bucket in self._buckets:
                    bucket.settle_unused()
        else:
            self._updater.end_update()
        if self._current is not None:
            self._current.buckets.extend(self._records)
            self._current.add("wait", wait_start_s, _core.now_s())
        self._begin_anew()

    def _begin_anew(self) -> None:
        for bucket in self._buckets:
            bucket.reset()
        self._records = []
        self._next = 0
        self._expects = False

    def _abandon_backward(self) -> None:
        """If the last backward raised before its end. Whether the other ranks' did too shows in the next collective:
        its layout counts the attempts, so that a bucket of this one never meets another's of the next."""
        if not self._begun and self._next == 0:
            return
        self._torn = self.torn
        for record in self._records:  # they may still read and write the buckets
            with suppress(Error):  # which the next collective raises again
                record.work.wait()
        self._attempt += self._begun_to_sync
        self._begun = False
        self._begin_anew()

    # --- the iteration's end -----------------------------------------------------------------------------------------

    def _is_ours(self, optimizer: torch.optim.Optimizer) -> bool:
        if self._optimizer is not None:
            return optimizer is self._optimizer
        ours = {slot.param for slot in self._slots}
        return any(param in ours for group in optimizer.param_groups for param in group["params"])

    def _open_record(self, now: float) -> None:
        if self._current is None:
            self._count += 1
            self._current = IterationRecord(self._count, now)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._step_start_s = _core.now_s()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._current is None or not self._is_ours(optimizer):
            return
        now = self._current.end_s = _core.now_s()
        self._current.add("update", self._step_start_s, now)
        self._last, self._current = self._current, None

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the GradientAggregator has been closed")

    # --- set-up ----------------------------------------------------------------------------------------------------

    def _broadcast(self, module: torch.nn.Module) -> None:
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                if is_dense(tensor) and tensor.dtype in DTYPES:
                    self.comm.broadcast(tensor.detach())
                else:  # bool, complex, ...: a copy is bytes
                    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
                    self.comm.broadcast(copy.flatten().view(torch.uint8))
                    tensor.copy_(copy)
