"""The eager update on a GPU: each bucket's SGD step follows its all-reduce on the communicator's stream, while the
stream of backward goes on. Parameters stay where they are; every rank keeps a momentum of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyallreduce import _core
from pyallreduce._buffer import DTYPES, is_dense
from pyallreduce.buckets import Bucket
from pyallreduce.communicator import Communicator
from pyallreduce.eager import Updater, rule_of
from pyallreduce.errors import UsageError
from pyallreduce.sgd import SGD
from pyallreduce.sgd_device import Piece, Table, momentum_of
from pyallreduce.sides import DeviceSide


class DeviceUpdater(Updater):
    def __init__(
        self,
        comm: Communicator,
        side: DeviceSide,
        buckets: list[Bucket],
        optimizer: SGD,
        scale: float,
    ) -> None:
        for slot in (slot for bucket in buckets for slot in bucket.slots):
            if not is_dense(slot.param):
                raise UsageError(
                    f"{slot.name} overlaps itself or has gaps; an update needs dense memory"
                )
        super().__init__(buckets, optimizer, scale)
        self._comm, self._side, self._where = comm, side, side.where
        self._sgd = optimizer.on_device(side.where)
        self._tables: dict[int, Table] = {}  # by bucket, as long as memory stays where it is
        self._weights: dict[int, list[int]] = {}  # addresses, by bucket
        self._momentum: list[Any] = []  # addresses
        self._rules: list[_core.kernels.UpdateRule] = []  # of that update
        self._gate = {"found_inf": 0, "aborted": side.device.aborted}
        # By-products of the pass before clipping, and its result.
        self._found_inf = side.where.empty(1, torch.float32)
        self._sum_squares = side.where.empty(1, torch.float64)
        self._clip = side.where.empty(1, torch.float64)
        self.attach()

    def submit(self, bucket: Bucket, layout: int, subject: str) -> _core.DeviceWork:
        groups = self._optimizer.param_groups
        table = self._table_of(bucket)
        self._rules = self._sgd.rules(groups, is_gated=False)
        # From here on the weights may change under a graph that still holds them.
        self._optimizer._note_written([slot.param for slot in bucket.slots])
        work = self._side.device.update(
            table.table,
            table.image.data_ptr(),
            self._rules,
            bucket.flat.data_ptr(),
            bucket.flat.numel(),
            DTYPES[bucket.dtype],
            bucket.flags_begin,
            self._scale,
            layout,
            f"{subject}, with {'; '.join(map(rule_of, groups))}",
            self._where.stream(),
        )
        self._updated = True
        self._comm.keep_alive(work, bucket.flat, table.image, table.table)
        return work

    def update_clipped(
        self,
        max_norm: float,
        works: Sequence[_core.DeviceWork],
        labels: Sequence[tuple[int, str]],
    ) -> torch.Tensor:
        """On the current stream: all buckets are there. The device alone learns the norm."""
        self._found_inf.zero_()
        self._sum_squares.zero_()
        found = {
            "new_found_inf": self._found_inf.data_ptr(),
            "sum_squares": self._sum_squares.data_ptr(),
        }
        tables = [(self._table_of(bucket), bucket.flags.data_ptr()) for bucket in self._buckets]
        aborted = self._side.device.aborted
        for table, flags in tables:
            self._where.launch(
                "inspect",
                table.table,
                table.image.data_ptr(),
                flags=flags,
                aborted=aborted,
                **found,
            )
        self._where.launch("clip", self._sum_squares.data_ptr(), max_norm, self._clip.data_ptr())
        self._rules = self._sgd.rules(self._optimizer.param_groups, is_gated=True)
        self._gate = {"found_inf": self._found_inf.data_ptr(), "aborted": aborted}
        for bucket, (table, flags) in zip(self._buckets, tables, strict=True):
            self._optimizer._note_written([slot.param for slot in bucket.slots])
            self._where.launch(
                "update",
                table.table,
                table.image.data_ptr(),
                self._rules,
                flags=flags,
                clip=self._clip.data_ptr(),
                **self._gate,
            )
            bucket.flat.zero_()  # also where the gate was shut
        self._updated = True
        return self._sum_squares.sqrt()

    def _close_units(self) -> None:
        self._sgd.close(self._optimizer.param_groups, self._rules, self._gate)

    def adopt_momentum(self) -> None:
        """Makes what is missing, so that a step allocates nothing."""
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                self._optimizer._operands(group, param, param)

    def begin_backward(self) -> None:
        super().begin_backward()
        optimizer = self._optimizer
        momentum = momentum_of(optimizer.param_groups, optimizer.state)
        if momentum != self._momentum:  # the user has put others in their place
            self._tables.clear()
            self._momentum = momentum

    def _table_of(self, bucket: Bucket) -> Table:
        known, params = self._tables.get(bucket.index), [slot.param for slot in bucket.slots]
        weights = [param.data_ptr() for param in params]
        if (
            known is None
            or weights != self._weights[bucket.index]
            or not self._optimizer._masters_follow(params)
        ):
            pieces = [self._piece_of(slot.param, slot.grad) for slot in bucket.slots]
            dtypes = (self._optimizer._dtype_of(params[0]), bucket.dtype)
            known = self._tables[bucket.index] = Table(self._where, dtypes, pieces)
            self._weights[bucket.index] = weights
        return known

    def _piece_of(self, param: torch.nn.Parameter, grad: torch.Tensor) -> Piece:
        g = self._group_of[param]
        group = self._optimizer.param_groups[g]
        return self._optimizer._operands(group, param, grad).piece(g)
