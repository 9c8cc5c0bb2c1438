"""The eager update on the host: a bucket's reduction and SGD step in one pass over memory.

Parameters move into symmetric memory, where every rank can write its share of the new values to all, or into one copy
for all ranks of the host; the momentum is kept once per host, readable whole on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch.autograd.graph import increment_version

from pyallreduce import _core, clipping
from pyallreduce._buffer import DTYPES
from pyallreduce.buckets import Bucket, view_of
from pyallreduce.communicator import Communicator
from pyallreduce.eager import Updater, rule_of
from pyallreduce.errors import UsageError
from pyallreduce.sgd import SGD
from pyallreduce.sgd_rule import change_of_unit, momentum_lr_of, scalars_of


class _Place:
    """Where a bucket's weights and momentum live, and the table that tells the core about its parameters."""

    def __init__(
        self,
        bucket: Bucket,
        comm: Communicator,
        group_of: Mapping[torch.nn.Parameter, int],
        one_copy: bool,
    ) -> None:
        self.weights = comm._allocate(bucket.flags_begin, bucket.dtype, one_copy)
        self.momentum = comm._allocate(bucket.flags_begin, bucket.dtype, one_copy=True)
        self.weight_views = [view_of(self.weights, slot) for slot in bucket.slots]
        self.momentum_views = [view_of(self.momentum, slot) for slot in bucket.slots]
        self.versions: list[int] = []  # of the parameters, as the last update or adoption left them
        self.plan = _core.UpdatePlan(
            [(slot.begin, slot.param.numel(), group_of[slot.param]) for slot in bucket.slots],
            bucket.flags_begin,
        )

    def remember_versions(self, bucket: Bucket) -> None:
        self.versions = [slot.param._version for slot in bucket.slots]


class HostUpdater(Updater):
    """Collective construction, in bucket order."""

    def __init__(
        self,
        comm: Communicator,
        buckets: list[Bucket],
        optimizer: SGD,
        scale: float,
        is_shared: bool,
    ) -> None:
        super().__init__(buckets, optimizer, scale)
        self._comm, self.is_shared = comm, is_shared
        self._places = [_Place(bucket, comm, self._group_of, is_shared) for bucket in buckets]
        self._units: list[float] = []  # of each group's momentum after the last update
        self.adopt_weights()
        self.attach()

    def submit(self, bucket: Bucket, layout: int, subject: str) -> _core.Work:
        return self._submit(bucket, self._scale, False, layout, subject)

    def update_clipped(
        self, max_norm: float, works: Sequence[_core.Work], labels: Sequence[tuple[int, str]]
    ) -> float:
        norm = clipping.norm_of(works)
        if not math.isfinite(norm):
            self._skip()
            return norm
        clip = clipping.coefficient(norm, max_norm)
        updates = [
            self._submit(bucket, clip, True, *label)
            for bucket, label in zip(self._buckets, labels, strict=True)
        ]
        for work in updates:
            work.wait()
        return norm

    def _submit(
        self, bucket: Bucket, scale: float, is_reduced: bool, layout: int, subject: str
    ) -> _core.Work:
        if not self.is_shared:
            self._adopt_weights(bucket)
        place, groups = self._places[bucket.index], self._optimizer.param_groups
        self._units = [momentum_lr_of(group) for group in groups]
        # From here on the weights may change under a graph that still holds them.
        increment_version([slot.param for slot in bucket.slots])
        place.remember_versions(bucket)
        work = self._comm.core.update(
            place.plan,
            [(scalars_of(group), change_of_unit(group)) for group in groups],
            bucket.flat.data_ptr(),
            bucket.flat.numel(),
            place.weights.data_ptr(),
            place.momentum.data_ptr() if any(group["momentum"] for group in groups) else 0,
            DTYPES[bucket.dtype],
            scale,
            is_reduced,
            layout,
            f"{subject}, with {'; '.join(map(rule_of, groups))}",
        )
        self._updated = True
        self._comm.keep_alive(work, bucket.flat, place.weights, place.momentum)
        return work

    def _skip(self) -> None:
        """Ends a backward whose gradients are not finite: no weight or momentum changes, gradients become zero."""
        for bucket in self._buckets:
            bucket.flat.zero_()
        self._units = [group["momentum_lr"] for group in self._optimizer.param_groups]
        self._updated = True

    def _close_units(self) -> None:
        for group, unit in zip(self._optimizer.param_groups, self._units, strict=True):
            if group["form"] == "absorbed":
                group["momentum_lr"] = unit

    def adopt_momentum(self) -> None:
        """Moves the optimizer's momentum buffers into the shared ones."""
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
        """Gives the optimizer a momentum, and with shared parameters the module weights, of this rank's own again."""
        for bucket in self._buckets:
            for slot in bucket.slots:
                state = self._optimizer.state[slot.param]
                state["momentum_buffer"] = state["momentum_buffer"].clone()
                if self.is_shared:
                    slot.param.data = slot.param.data.clone()
        super().detach()

    def check_unwritten(self) -> None:
        for bucket, place in zip(self._buckets, self._places, strict=True):
            for slot, view, version in zip(
                bucket.slots, place.weight_views, place.versions, strict=True
            ):
                if slot.param._version != version or slot.param.data_ptr() != view.data_ptr():
                    raise UsageError(
                        f"{slot.name} was written outside the update; with share_parameters=True all ranks of the "
                        "host see one copy: write in `with agg.writing():`"
                    )

    def adopt_weights(self) -> None:
        """Those whose memory is not ours: at first, or after the user has assigned ``p.data``."""
        for bucket in self._buckets:
            self._adopt_weights(bucket)
        if self.is_shared:
            self._comm.barrier()

    def _adopt_weights(self, bucket: Bucket) -> None:
        place = self._places[bucket.index]
        is_writer = not self.is_shared or self._comm.local_rank == 0
        for slot, view in zip(bucket.slots, place.weight_views, strict=True):
            if slot.param.data_ptr() != view.data_ptr():
                if is_writer:
                    view.copy_(slot.param.data)
                slot.param.data = view
        place.remember_versions(bucket)
