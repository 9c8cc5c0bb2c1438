"""A GPU as the library uses it: its streams, memory and kernels. Tests put a mock on the host in its place, which is
why ``of`` is the only way to one."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch

from pyallreduce import _core, device
from pyallreduce.errors import UsageError


class Gpu:
    """The device that torch calls ``cuda:<index>``."""

    is_mocked = False

    def __init__(self, index: int) -> None:
        self.index = index

    def __str__(self) -> str:
        return f"cuda:{self.index}"

    @property
    def kernels(self) -> type[_core.cuda]:
        """UsageError where CUDA was not compiled in."""
        if not _core.has_cuda:
            raise UsageError(
                "parameters on a GPU need the CUDA kernels, without which pyallreduce was built; install it with "
                "nvcc on PATH (pyallreduce doctor)"
            )
        return _core.cuda

    def launch(self, kernel: str, *args: Any, **kwargs: Any) -> None:
        """One of ``kernels``, on the current stream."""
        with torch.cuda.device(self.index):
            getattr(self.kernels, kernel)(*args, stream=self.stream(), **kwargs)

    def stream(self) -> int:
        """The handle of the stream that the calling thread queues its work on."""
        return torch.cuda.current_stream(self.index).cuda_stream

    def aside(self) -> AbstractContextManager[Any]:
        """Another current stream, for a thread whose waits must not hold back what others compute."""
        return torch.cuda.stream(self._aside)

    @functools.cached_property
    def _aside(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.index)

    def future(self) -> torch.futures.Future[Any]:
        """Complete when the device will be: who waits for it is held back there."""
        return torch.futures.Future(devices=[torch.device("cuda", self.index)])

    def settle(self) -> None:
        """What has been queued may run while the host goes on."""

    def open(self, core: _core.Communicator) -> _core.Device:
        """The communicator's half on this device. Error that says what is missing."""
        return _core.Device(
            core,
            self.index,
            device.folders_of(*device.CUDA_RUNTIME),
            device.folders_of(*device.NCCL),
            self.is_mocked,
        )

    def upload(self, data: bytes) -> torch.Tensor:
        """As bytes on the device; the host does not wait."""
        pinned = torch.frombuffer(bytearray(data), dtype=torch.uint8).pin_memory()
        return pinned.to(f"cuda:{self.index}", non_blocking=True)

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(numel, dtype=dtype, device=f"cuda:{self.index}")

    def view(self, memory: _core.DeviceMemory, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """The tensor keeps the memory."""
        owner = _Foreign(memory)
        return torch.as_tensor(owner, device=f"cuda:{self.index}")[: numel * dtype.itemsize].view(
            dtype
        )


class _Foreign:
    """Memory in a form that torch adopts without a copy."""

    def __init__(self, memory: _core.DeviceMemory) -> None:
        self._memory = memory
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (memory.bytes,),
            "typestr": "|u1",
            "data": (memory.address, False),
            "version": 3,
        }


_gpu = functools.cache(Gpu)


def of(tensor: torch.Tensor) -> Gpu | None:
    """Where the tensor lies; None: on the host. UsageError for other devices."""
    if tensor.is_cpu:
        return None
    if not tensor.is_cuda:
        raise UsageError(f"a tensor is on {tensor.device}; accepted are CPU and CUDA tensors")
    return _gpu(tensor.device.index)
