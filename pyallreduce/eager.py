"""The eager update: a bucket's reduction and SGD step in one pass over memory, while backward still runs.

Parameters move into symmetric memory, where every rank can write its share of the new values to all; the momentum is
kept once per host, readable whole on every rank.
"""

from __future__ import annotations

import torch
from torch.autograd.graph import increment_version

from pyallreduce import _core
from pyallreduce._buffer import DTYPES
from pyallreduce.buckets import Bucket, view_of
from pyallreduce.communicator import Communicator
from pyallreduce.errors import UsageError
from pyallreduce.sgd import SGD, change_of_unit, momentum_lr_of, scalars_of


class _Place:
    """Where a bucket's weights and momentum live, and the table that tells the core about its parameters."""

    def __init__(self, bucket: Bucket, comm: Communicator, optimizer: SGD) -> None:
        self.weights = comm.symmetric_empty(bucket.flags_begin, bucket.dtype)
        self.momentum = comm._allocate(bucket.flags_begin, bucket.dtype, one_copy=True)
        self.weight_views = [view_of(self.weights, slot) for slot in bucket.slots]
        self.momentum_views = [view_of(self.momentum, slot) for slot in bucket.slots]
        group_of = {
            param: g for g, group in enumerate(optimizer.param_groups) for param in group["params"]
        }
        self.plan = _core.UpdatePlan(
            [(slot.begin, slot.param.numel(), group_of[slot.param]) for slot in bucket.slots],
            bucket.flags_begin,
        )


def check_optimizer(optimizer: torch.optim.Optimizer | None, buckets: list[Bucket]) -> SGD:
    """UsageError unless it is a par.SGD, free, over exactly the buckets' parameters."""
    if not isinstance(optimizer, SGD):
        raise UsageError('update="eager" needs optimizer=par.SGD(...), which computes the update')
    if optimizer._eager is not None:
        raise UsageError("this optimizer is attached to another aggregator; close that one first")
    slots = {slot.param: slot.name for bucket in buckets for slot in bucket.slots}
    held = {param for group in optimizer.param_groups for param in group["params"]}
    missing = [name for param, name in slots.items() if param not in held]
    if missing or len(held) != len(slots):
        raise UsageError(
            'update="eager" needs an optimizer over exactly the trainable parameters; '
            + (f"it lacks {', '.join(missing[:5])}" if missing else "it holds others too")
        )
    return optimizer


class EagerUpdater:
    """Collective construction, in bucket order. ``optimizer`` has passed ``check_optimizer``."""

    def __init__(self, comm: Communicator, buckets: list[Bucket], optimizer: SGD) -> None:
        self._comm, self._buckets, self._optimizer = comm, buckets, optimizer
        self._places = [_Place(bucket, comm, optimizer) for bucket in buckets]
        self._updated = False  # since the last step()
        self._units: list[float] = []  # of each group's momentum after the last update
        self.gradients_are_zero = False  # a pass has consumed them, and nothing came since
        optimizer._eager = self
        for bucket in buckets:
            self._adopt_weights(bucket)
        self.adopt_momentum()

    def submit(self, bucket: Bucket, op: _core.Op, layout: int) -> _core.Work:
        """Starts the bucket's one pass; the learning rates are those of now."""
        self._adopt_weights(bucket)
        place, groups = self._places[bucket.index], self._optimizer.param_groups
        self._units = [momentum_lr_of(group) for group in groups]
        # From here on the weights may change under a graph that still holds them.
        increment_version([slot.param for slot in bucket.slots])
        self._updated = True
        work = self._comm.core.update(
            place.plan,
            [(scalars_of(group), change_of_unit(group)) for group in groups],
            bucket.flat.data_ptr(),
            bucket.flat.numel(),
            place.weights.data_ptr(),
            place.momentum.data_ptr() if any(group["momentum"] for group in groups) else 0,
            DTYPES[bucket.dtype],
            op,
            layout,
        )
        self._comm.keep_alive(work, bucket.flat, place.weights, place.momentum)
        return work

    def begin_backward(self) -> None:
        if self._updated:
            raise UsageError(
                'a second backward before step(): with update="eager" the first has updated the parameters already. '
                "Accumulate under no_sync(), or call step()"
            )
        self.gradients_are_zero = False

    def end_update(self) -> None:
        """All buckets are updated."""
        self.gradients_are_zero = True

    def close_update(self) -> None:
        """``step()``: the next backward may update again."""
        if self._updated:
            for group, unit in zip(self._optimizer.param_groups, self._units, strict=True):
                if group["form"] == "absorbed":
                    group["momentum_lr"] = unit
        self._updated = False

    def adopt_momentum(self) -> None:
        """Moves the optimizer's momentum buffers into the shared ones, after it was built or has loaded a state."""
        for bucket, place in zip(self._buckets, self._places, strict=True):
            for slot, view in zip(bucket.slots, place.momentum_views, strict=True):
                state = self._optimizer.state[slot.param]
                loaded = state.get("momentum_buffer")
                if loaded is None:
                    view.zero_()
                elif loaded is not view:
                    view.copy_(loaded)
                state["momentum_buffer"] = view

    def detach(self) -> None:
        """Gives the optimizer a momentum of this rank's own again."""
        for bucket in self._buckets:
            for slot in bucket.slots:
                state = self._optimizer.state[slot.param]
                state["momentum_buffer"] = state["momentum_buffer"].clone()
        self._optimizer._eager = None

    def _adopt_weights(self, bucket: Bucket) -> None:
        """Parameters whose memory is not ours (at first, or after the user has assigned ``p.data``)."""
        place = self._places[bucket.index]
        for slot, view in zip(bucket.slots, place.weight_views, strict=True):
            if slot.param.data_ptr() != view.data_ptr():
                view.copy_(slot.param.data)
                slot.param.data = view
