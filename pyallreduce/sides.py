"""Where an aggregator's buckets are reduced: on the host, or on this rank's GPU. All that differs between the two, but
for the eager update (pyallreduce/eager_host.py, pyallreduce/eager_device.py) and the drift sentinel's hash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from pyallreduce import _core, clipping, gpu
from pyallreduce._buffer import OPS, span_of
from pyallreduce.buckets import Bucket
from pyallreduce.communicator import Communicator
from pyallreduce.errors import Error, UsageError
from pyallreduce.report import Time


class Side(Protocol):
    @property
    def where(self) -> gpu.Gpu | None: ...

    def now(self) -> Time:
        """On a GPU: when what has been queued on the current stream is done."""

    def memory(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """For a bucket; undefined. Collective."""

    def submit(
        self, bucket: Bucket, op: _core.Op, layout: int, wants_norm: bool, subject: str
    ) -> Any:
        """Starts the bucket's all-reduce; it does not wait."""

    def wait(self, works: Sequence[Any]) -> None:
        """Until results are there for who uses them on the calling thread. Raises what they raised."""

    def nonfinite_of(self, work: Any) -> tuple[int | None, int] | None:
        """The rank (None: only the sum overflows) and element of the first inf or NaN; None on a GPU: unknown."""

    def norm(self, buckets: Sequence[Bucket], works: Sequence[Any]) -> float:
        """Of all reduced gradients; the host waits for it."""

    def scale(self, buckets: Sequence[Bucket], factor: float) -> None: ...

    def is_lost(self) -> bool:
        """True if an error has come after wait() had returned: what was computed since may be garbage."""


class HostSide:
    """Buckets are symmetric memory."""

    where = None

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm

    def now(self) -> float:
        return _core.now_s()

    def memory(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return self._comm.symmetric_empty(numel, dtype)

    def submit(
        self, bucket: Bucket, op: _core.Op, layout: int, wants_norm: bool, subject: str
    ) -> _core.Work:
        address, numel, dtype, _ = span_of(bucket.flat)
        work = self._comm.core.aggregate(
            address, numel, dtype, op, layout, bucket.flags_begin, wants_norm, subject
        )
        self._comm.keep_alive(work, bucket.flat)
        return work

    def wait(self, works: Sequence[_core.Work]) -> None:
        for work in works:
            work.wait()

    def nonfinite_of(self, work: _core.Work) -> tuple[int | None, int] | None:
        return work.findings()[1]

    def norm(self, buckets: Sequence[Bucket], works: Sequence[_core.Work]) -> float:
        return clipping.norm_of(works)

    def scale(self, buckets: Sequence[Bucket], factor: float) -> None:
        clipping.scale_gradients(buckets, factor)

    def is_lost(self) -> bool:
        return False


class DeviceSide:
    """Buckets are memory that NCCL has registered, where it gives such. Collective construction."""

    def __init__(self, comm: Communicator, where: gpu.Gpu) -> None:
        self._comm, self._where = comm, where
        self.device = comm.on_device(where)
        self._undivided: list[Bucket] = []  # without our kernels torch divides, after wait()
        comm.broadcast(where.empty(1, torch.uint8))  # makes NCCL's communicator, if there is none

    @property
    def where(self) -> gpu.Gpu:
        return self._where

    def now(self) -> Time:
        return self.device.mark(self._where.stream())

    def memory(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        try:
            memory = self.device.allocate(numel * dtype.itemsize)
        except Error:  # an old NCCL, or a device without virtual memory: only a little slower
            return self._where.empty(numel, dtype)
        return self._where.view(memory, numel, dtype)

    def submit(
        self, bucket: Bucket, op: _core.Op, layout: int, wants_norm: bool, subject: str
    ) -> _core.DeviceWork:
        address, numel, dtype, _ = span_of(bucket.flat)
        if op is OPS["avg"] and not self.device.has_kernels:
            op = OPS["sum"]
            self._undivided.append(bucket)
        work = self.device.aggregate(
            address, numel, dtype, op, layout, subject, self._where.stream()
        )
        self._comm.keep_alive(work, bucket.flat)
        return work

    def wait(self, works: Sequence[_core.DeviceWork]) -> None:
        for work in works:
            work.wait_launched()
        self.device.hold_back(self._where.stream())
        self._where.settle()
        for bucket in self._undivided:
            bucket.flat[: bucket.flags_begin].div_(self._comm.size)
        self._undivided.clear()

    def nonfinite_of(self, work: _core.DeviceWork) -> None:
        return None

    def norm(self, buckets: Sequence[Bucket], works: Sequence[_core.DeviceWork]) -> float:
        norms = [
            torch.linalg.vector_norm(bucket.flat[: bucket.flags_begin], dtype=torch.float64)
            for bucket in buckets
        ]
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def scale(self, buckets: Sequence[Bucket], factor: float) -> None:
        for bucket in buckets:
            bucket.flat[: bucket.flags_begin].mul_(factor)

    def is_lost(self) -> bool:
        try:
            self._comm.core.check_not_failed()
        except Error:
            return True
        return False


def side_of(comm: Communicator, params: Sequence[torch.Tensor]) -> Side:
    """UsageError unless all of ``params`` lie on the host, or on one GPU."""
    places = {gpu.of(param) for param in params}
    if len(places) > 1:
        names = sorted("the CPU" if place is None else str(place) for place in places)
        raise UsageError(
            f"trainable parameters lie on {' and '.join(names)}; they must be on one device"
        )
    where = next(iter(places), None)
    return HostSide(comm) if where is None else DeviceSide(comm, where)
