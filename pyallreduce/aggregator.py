"""GradientAggregator: layer-wise aggregation that runs while backward still does (paper, section 4).

Autograd tells when a parameter's gradient is complete; when a bucket's last one is, its collective starts on the
communicator's worker. Buckets start in one order, equal on all ranks. An engine callback at the end of backward starts
what is left, and waits.
"""

from __future__ import annotations

import collections
import functools
import math
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

from pyallreduce import clipping, gpu
from pyallreduce._buffer import DTYPES, OPS, is_dense, span_of
from pyallreduce.agreement import check_agreement
from pyallreduce.buckets import (
    DEFAULT_BUCKET_BYTES,
    Bucket,
    Slot,
    layout_hash,
    layout_lines,
    make_buckets,
)
from pyallreduce.communicator import Communicator
from pyallreduce.drift import DriftSentinel
from pyallreduce.eager import Updater, check_optimizer
from pyallreduce.eager_device import DeviceUpdater
from pyallreduce.eager_host import HostUpdater
from pyallreduce.errors import Error, UsageError
from pyallreduce.report import BucketRecord, Iteration, IterationRecord, NonFinite, Time, summarise
from pyallreduce.sgd import SGD
from pyallreduce.sides import DeviceSide, Side, side_of
from pyallreduce.trace import open_trace


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
    only closes the iteration.

    ``check_every``: in the first and then in every so many-th iteration (no_sync() does not count; 0: never) a hash of
    the parameters, and of what ``optimizer`` keeps about them if it is given, is compared between ranks. If ranks
    differ, backward raises a MismatchError on all of them with the parameter, and in ``peers`` the ranks. With
    update="step" the weights are then untouched. An eager update writes all ranks' weights and so makes them equal
    again, wrongly: there only the first iteration after the cause can tell, which is compared too if the cause lies in
    ``with agg.writing():``; ``torn`` says whether it has updated then. Not compared is what a host has one copy of:
    momentum with "eager", parameters with ``share_parameters``. DDP with our hooks has no such check.

    Collective; raises UsageError, and MismatchError if the ranks' modules differ.
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
        check_every: int = 100,
    ) -> None:
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            raise UsageError(
                "the module is wrapped in DDP already; pass the plain module, or use DDP with allreduce_hook"
            )
        if op not in ("avg", "sum"):
            raise UsageError(f"op is {op!r}; gradients can be aggregated by 'avg' or 'sum'")
        if bucket_bytes is not None and (not isinstance(bucket_bytes, int) or bucket_bytes <= 0):
            raise UsageError(f"bucket_bytes is {bucket_bytes!r}; a positive whole number is needed")
        if wire_dtype is not None:
            raise UsageError(f"wire_dtype={wire_dtype} is planned, not there yet; leave it out")
        if update not in ("step", "eager"):
            raise UsageError(f"update is {update!r}; accepted are 'step' and 'eager'")
        if share_parameters and update != "eager":
            raise UsageError('share_parameters=True needs update="eager", which writes each once')
        if max_norm is not None and not (
            isinstance(max_norm, (int, float)) and 0 < max_norm < math.inf
        ):
            raise UsageError(f"max_norm is {max_norm!r}; a positive, finite number is needed")
        if not isinstance(check_every, int) or check_every < 0:
            raise UsageError(f"check_every is {check_every!r}; a whole number >= 0 is needed")

        self.module: torch.nn.Module | None = module
        self.comm, self.op = comm, OPS[op]
        self._optimizer, self._max_norm = optimizer, max_norm
        self._buckets = make_buckets(module, bucket_bytes or DEFAULT_BUCKET_BYTES)
        self._slots = [slot for bucket in self._buckets for slot in bucket.slots]
        for slot in self._slots:
            span_of(slot.param.detach().flatten(), f"parameter {slot.name}")  # device and dtype
        sgd = check_optimizer(optimizer, self._buckets) if update == "eager" else None
        options = {
            "op": op,
            "update": update,
            "bucket_bytes": bucket_bytes or DEFAULT_BUCKET_BYTES,
            "share_parameters": bool(share_parameters),
            "max_norm": max_norm,
            "check_every": check_every,
        }
        if share_parameters and any(gpu.of(slot.param) for slot in self._slots):
            raise UsageError("share_parameters=True is one copy in a host's memory: not for GPUs")
        lines = layout_lines(module, self._buckets, options)
        self._layout = layout_hash(lines)
        self._trace = open_trace(comm.rank, comm.size)
        check_agreement(comm, lines)
        self._side: Side = side_of(comm, [slot.param for slot in self._slots])
        self._broadcast(module)
        for bucket in self._buckets:
            bucket.allocate(self._side.memory)
        self._updater = self._make_updater(sgd, bool(share_parameters))
        if isinstance(self._side, DeviceSide) and isinstance(optimizer, SGD):
            optimizer.on_device(self._side.where).source = self._side.device

        self._sentinel = self._drift_sentinel(module, check_every)
        self._syncs = True  # False inside no_sync()
        self._expects = False  # a forward has run whose gradients are not aggregated yet
        # The engine's callback at the end of backward; gone as soon as a backward has raised.
        self._callback: Callable[[], Callable[[], None] | None] = _no_callback
        self._graph_task = -1  # the outermost backward, of those that run inside each other
        self._begun = False  # gradients have come in a backward that has not ended yet
        self._begun_to_sync = False  # and it is to aggregate them
        self._attempt = 0  # backwards that raised before their end
        self._num_steps = 0  # of the optimizer
        self._stepping = False  # step() has begun; with a closure there are forwards inside
        self._torn = False
        self._updating = False  # an eager update is under way
        self._next = 0  # the first bucket whose collective has not started
        self._records: list[BucketRecord] = []  # of started buckets, not yet waited for
        self._count = 0
        self._current: IterationRecord | None = None
        self._ended: collections.deque[IterationRecord] = collections.deque()
        self._last: Iteration | None = None
        self._forward_start_s: Time = 0.0
        self._forward_end_s: Time = 0.0
        self._backward_start_s: Time = 0.0
        self._step_start_s: Time = 0.0
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
        self._check_usable()
        if not self._expects or not self._syncs:
            return
        while self._next < len(self._buckets):
            self._start(self._buckets[self._next])
        self._wait()

    @contextmanager
    def writing(self) -> Iterator[bool]:
        """For writes to the parameters outside the update, ``load_state_dict`` for one: no rank of the host reads or
        updates them meanwhile. With ``share_parameters`` one rank writes for all, the one that gets True; without,
        every rank does. Collective; do not communicate inside.
        """
        self._check_usable()
        is_shared = self._updater is not None and self._updater.is_shared
        if is_shared:
            self.comm.barrier()
        yield self.comm.local_rank == 0 or not is_shared
        if self._updater is not None:
            self._updater.adopt_weights()
        if self._sentinel is not None:
            self._sentinel.look_soon()

    def report(self) -> dict[str, Any]:
        """What the last finished iteration spent on communication, from this rank's event record. Local, JSON-able.

        Seconds from the first forward to the return of ``step()``; ``overlap_ratio`` is None without communication.
        ``iteration`` counts from 1; 0 while none has finished. Keys: iteration, window_s, compute_s, comm_busy_s,
        exposed_comm_s, overlap_ratio, idle_s, skew_s, slowest_rank, buckets, phases; definitions in
        pyallreduce/report.py. ``nonfinite``: None, or the rank and parameter with which the first inf or NaN came into
        the aggregate (rank None: only the sum overflows; not looked for if size is 1, unless the update is eager or
        ``max_norm`` is set; on a GPU: never). ``grad_norm``: before clipping, with ``max_norm``.

        On a GPU seconds are its own, from events on its streams, and the last iteration is the last one that it has
        finished; torch.cuda.synchronize() makes that the last one. Exposed is what the compute stream waited for.
        """
        self._close_records()
        return summarise(self._last, self.comm.size)

    @property
    def torn(self) -> bool:
        """True if an eager iteration failed half-way: some buckets may be updated, others not. On a GPU after every
        failure, since what had been queued by then may have used an aggregate that never came."""
        return self._torn or self._updating or self._side.is_lost()

    def close(self) -> None:
        """Removes the hooks; gradients stay where they are. Local, idempotent."""
        if self._closed:
            return
        self._closed = True
        for handle in self._handles:
            handle.remove()
        if self._updater is not None:
            self._updater.detach()
        if isinstance(self._side, DeviceSide) and isinstance(self._optimizer, SGD):
            self._optimizer.on_device(self._side.where).source = None
        self._close_records()
        if self._trace is not None:
            self._trace.flush()

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
        if self._updater is not None and self._updater.is_shared:
            self._updater.check_unwritten()
        now = self._forward_start_s = self._side.now()
        self._expects = True
        if self._current is not None and self._current.buckets and not self._stepping:
            self._close_record(now)  # a replayed CUDA graph, or none of torch's optimizers
        self._open_record(now)

    def _after_forward(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not self._is_watched(module):
            return
        assert self._current is not None
        self._forward_end_s = self._side.now()
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
            bucket.ready_s = self._side.now()
            while self._next < len(self._buckets) and self._buckets[self._next].pending == 0:
                self._start(self._buckets[self._next])

    def _enter_backward(self) -> None:
        if self._callback() is not None:
            return
        # Before autograd adds anything to gradients: a forked child's are its parent's own.
        self.comm.core.refuse_forked_child()
        self._abandon_backward()

        def end_of_backward() -> None:
            self._end_of_backward()

        self._callback = weakref.ref(end_of_backward)
        self._graph_task = torch._C._current_graph_task_id()
        Variable._execution_engine.queue_callback(end_of_backward)

    def _begin_backward(self, param: torch.Tensor) -> None:
        self._check_open()
        self.comm.core.check_not_failed()  # what an eager update lacks would hide the first cause
        if self._updater is not None:
            try:
                self._updater.begin_backward()
            except UsageError:
                param.grad = None  # it was consumed and zero, before autograd added to it just now
                raise
        self._begun, self._begun_to_sync = True, self._syncs
        self._expects = True
        self._backward_start_s = self._forward_end_s or self._side.now()
        self._open_record(self._backward_start_s)

    def _end_of_backward(self) -> None:
        self._callback = _no_callback
        if not self._begun:  # torch.autograd.grad, for one: it accumulates nothing
            return
        assert self._current is not None
        self._current.add("backward", self._backward_start_s, self._side.now())
        self._forward_end_s = 0.0
        self.synchronize()
        self._begun = False

    # --- collectives -----------------------------------------------------------------------------------------------

    def _start(self, bucket: Bucket) -> None:
        """Submits the bucket's collective; on the autograd thread, which must not wait."""
        ready_s = bucket.ready_s if bucket.pending == 0 else self._side.now()
        with torch.no_grad():
            bucket.announce_use()
        if self._next == 0 and self._sentinel is not None:
            self._sentinel.look()
        layout, subject = self._layout_of(bucket), self._subject_of(bucket)
        work: Any
        if self._updater is not None and self._max_norm is None:
            self._updating = True
            work = self._updater.submit(bucket, layout, subject)
        else:
            work = self._side.submit(bucket, self.op, layout, self._max_norm is not None, subject)
        if self._next == 0 and self._sentinel is not None:
            self._sentinel.gather()
        increment_version(bucket.flat)
        names = [slot.name for slot in bucket.slots]
        self._records.append(BucketRecord(bucket.index, bucket.nbytes, names, ready_s, work))
        self._next += 1

    def _layout_of(self, bucket: Bucket) -> int:
        """With the index, so that a rank that has lost a backward is told so and does not mix up buckets; with the
        iteration, so that one that has communicated less often does not mix up gradients."""
        where = self._num_steps << 32 | self._attempt << 16 | bucket.index
        return (self._layout + where) % 2**64

    def _subject_of(self, bucket: Bucket) -> str:
        """For the message if another rank calls something else."""
        attempt = f" (after {self._attempt} that raised)" if self._attempt else ""
        iteration = f"iteration {self._num_steps + 1}{attempt}"
        return f"bucket {bucket.index}, {bucket.span_of_names}, in {iteration}"

    def _wait(self) -> None:
        wait_start_s = self._side.now()
        for record in self._records:
            record.used_s = wait_start_s
        self._side.wait([record.work for record in self._records])
        if self._sentinel is not None:
            self._sentinel.finish()
        if self._updater is None:
            with torch.no_grad():
                for bucket in self._buckets:
                    bucket.settle_unused()
        if self._current is not None:
            self._current.buckets.extend(self._records)
            self._current.nonfinite = self._first_nonfinite()
            self._current.add("wait", wait_start_s, self._side.now())
        if self._max_norm is not None:
            self._clip(self._max_norm)
        if self._updater is not None:
            self._updater.end_update()
        self._begin_anew()

    def _first_nonfinite(self) -> NonFinite | None:
        for record in self._records:
            if (found := self._side.nonfinite_of(record.work)) is not None:
                rank, element = found
                return NonFinite(rank, self._buckets[record.index].slot_at(element).name)
        return None

    def _clip(self, max_norm: float) -> None:
        """All buckets are reduced. With an eager update, its second pass."""
        start_s = self._side.now()
        works = [record.work for record in self._records]
        norm: float | torch.Tensor
        if self._updater is not None:
            self._updating = True
            labels = [(self._layout_of(b), self._subject_of(b)) for b in self._buckets]
            norm = self._updater.update_clipped(max_norm, works, labels)
        else:
            norm = self._side.norm(self._buckets, works)
            if math.isfinite(norm):
                self._side.scale(self._buckets, clipping.coefficient(norm, max_norm))
            else:
                for slot in self._slots:
                    slot.param.grad = None  # every optimizer leaves weight and momentum alone then
        if self._current is not None:
            self._current.grad_norm = norm
            self._current.add("update", start_s, self._side.now())

    def _begin_anew(self) -> None:
        for bucket in self._buckets:
            bucket.reset()
        self._records = []
        self._next = 0
        self._expects = self._updating = False

    def _abandon_backward(self) -> None:
        """If the last backward raised before its end. Whether the other ranks' did too shows in the next collective:
        its layout counts the attempts, so that a bucket of this one never meets another's of the next."""
        if not self._begun and self._next == 0:
            return
        self._torn = self.torn
        for record in self._records:  # they may still read and write the buckets
            with suppress(Error):  # which the next backward raises again
                self._side.wait([record.work])
        self._attempt += self._begun_to_sync
        self._begun = False
        self._begin_anew()

    # --- the iteration's end -----------------------------------------------------------------------------------------

    def _is_ours(self, optimizer: torch.optim.Optimizer) -> bool:
        if self._optimizer is not None:
            return optimizer is self._optimizer
        ours = {slot.param for slot in self._slots}
        return any(param in ours for group in optimizer.param_groups for param in group["params"])

    def _close_records(self) -> None:
        """Of iterations that are over, on the device too."""
        while self._ended and self._ended[0].is_over():
            self._last = self._ended.popleft().finished()
            if self._trace is not None:
                self._trace.add(self._last)

    def _close_record(self, now: Time) -> None:
        assert self._current is not None
        self._current.end_s = now
        self._ended.append(self._current)
        self._current = None
        self._close_records()

    def _open_record(self, now: Time) -> None:
        if self._current is None:
            self._count += 1
            self._current = IterationRecord(self._count, now)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Set by GradScaler for the call, also after unscale_(), which comes too late: backward has clipped.
        found_inf = getattr(optimizer, "found_inf", None)
        if self._max_norm is not None and found_inf is not None and self._is_ours(optimizer):
            raise UsageError(
                "max_norm has clipped gradients that GradScaler had scaled; leave max_norm out, and call "
                "scaler.unscale_(opt) and clip_grad_norm_ before scaler.step(opt)"
            )
        self._stepping = self._stepping or self._is_ours(optimizer)
        self._step_start_s = self._side.now()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_ours(optimizer):
            return
        self._num_steps += 1
        self._stepping = False
        if self._current is None:
            return
        now = self._side.now()
        self._current.add("update", self._step_start_s, now)
        self._close_record(now)

    def _check_usable(self) -> None:
        self._check_open()
        self.comm.core.refuse_forked_child()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the GradientAggregator has been closed")

    # --- set-up ----------------------------------------------------------------------------------------------------

    def _make_updater(self, optimizer: SGD | None, is_shared: bool) -> Updater | None:
        """Collective, if there is an optimizer to run during backward."""
        if optimizer is None:
            return None
        scale = 1.0 / self.comm.size if self.op is OPS["avg"] else 1.0
        if isinstance(self._side, DeviceSide):
            return DeviceUpdater(self.comm, self._side, self._buckets, optimizer, scale)
        if any(optimizer._dtype_of(slot.param) != slot.param.dtype for slot in self._slots):
            raise UsageError(
                'master_weights=True with update="eager" is for GPUs; on the host use update="step"'
            )
        return HostUpdater(self.comm, self._buckets, optimizer, scale, is_shared)

    def _drift_sentinel(self, module: torch.nn.Module, every: int) -> DriftSentinel | None:
        """Over all parameters, frozen ones too, and their optimizer state, but for what the ranks have one copy of."""
        if every == 0 or self.comm.size == 1:
            return None
        trained = {slot.param for slot in self._slots}
        on_one_host = trained if self.comm.num_nodes == 1 else set()
        updater = self._updater
        one_copy_weights = on_one_host if updater is not None and updater.is_shared else set()
        one_copy_momentum = on_one_host if isinstance(updater, HostUpdater) else set()
        named = list(module.named_parameters())
        weights = [(name, p) for name, p in named if p not in one_copy_weights]
        momentum = [(name, p) for name, p in named if p in trained - one_copy_momentum]
        return DriftSentinel(self.comm, weights, momentum, self._optimizer, every, self._side.where)

    def _broadcast(self, module: torch.nn.Module) -> None:
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                if is_dense(tensor) and tensor.dtype in DTYPES:
                    self.comm.broadcast(tensor.detach())
                else:  # bool, complex, ...: a copy is bytes
                    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
                    self.comm.broadcast(copy.flatten().view(torch.uint8))
                    tensor.copy_(copy)
