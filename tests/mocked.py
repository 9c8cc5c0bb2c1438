"""A GPU and NCCL without either: host memory stands for the device's, tests/cpp/mock for the libraries."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from pyallreduce import _core, gpu

ROOT = Path(__file__).parent.parent
CPP = ROOT / "tests" / "cpp"
CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
# Library: its objects. Object: its source and macros. (tests/cpp/CMakeLists.txt builds the same.)
MOCKS = {
    "nccl_mock": ["cuda", "nccl"],
    "nccl_plain": ["cuda", "nccl_plain"],
    "nccl_old": ["nccl_old"],
    "nccl_hollow": ["nccl_hollow"],
}
OBJECTS = {
    "cuda": ("cuda.cc", []),
    "nccl": ("nccl.cc", []),
    "nccl_plain": ("nccl.cc", ["-DMOCK_WITHOUT_OPTIONAL"]),
    "nccl_old": ("nccl_version_only.cc", ["-DMOCK_VERSION=21403"]),
    "nccl_hollow": ("nccl_version_only.cc", ["-DMOCK_VERSION=23007"]),
}


def compile_cpp(*arguments: str | Path) -> None:
    if CXX is None:
        pytest.skip("no C++ compiler on PATH: what replaces NCCL cannot be built")
    command = [CXX, "-std=c++20", "-pthread", f"-I{ROOT / 'csrc'}", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr


def build_mocks(folder: Path) -> Path:
    def build(name: str) -> None:
        source, macros = OBJECTS[name]
        compile_cpp("-fPIC", "-c", *macros, CPP / "mock" / source, "-o", folder / f"{name}.o")

    with ThreadPoolExecutor() as pool:
        list(pool.map(build, OBJECTS))
    for library, objects in MOCKS.items():
        files = [folder / f"{name}.o" for name in objects]
        compile_cpp("-shared", *files, "-o", folder / f"lib{library}.so")
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Of processes that are to load the mock."""
    library = str(folder / "libnccl_mock.so")
    return {"PYALLREDUCE_NCCL": library, "PYALLREDUCE_CUDART": library, "TMPDIR": str(folder)}


class MockedGpu(gpu.Gpu):
    """Of the tensors that were put ``on`` it. What torch computes on them is done when its call returns; so wherever a
    stream is told to wait, this one waits: a result that nobody waits for is not there yet, and shows."""

    is_mocked = True

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        self._spans: list[tuple[int, int]] = []
        self._tensors: list[torch.Tensor] = []  # or their memory would soon be others'
        self._device: _core.Device | None = None
        self.num_settled = 0

    @property
    def kernels(self) -> Any:
        return _core.cuda_twin

    def launch(self, kernel: str, *args: Any, **kwargs: Any) -> None:
        getattr(self.kernels, kernel)(*args, **kwargs)

    def stream(self) -> int:
        return 0  # the default stream of the mock

    def aside(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def future(self) -> torch.futures.Future[Any]:
        return torch.futures.Future()

    def settle(self) -> None:
        self.num_settled += 1
        if self._device is None:
            return
        mark = self._device.mark(0)
        while mark.passed_s() is None:
            time.sleep(0)

    def open(self, core: _core.Communicator) -> _core.Device:
        self._device = super().open(core)
        return self._device

    def upload(self, data: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return self.put(torch.empty(numel, dtype=dtype))

    def view(self, memory: _core.DeviceMemory, numel: int, dtype: torch.dtype) -> torch.Tensor:
        nbytes = numel * dtype.itemsize
        raw = (ctypes.c_char * max(nbytes, 1)).from_address(memory.address)
        raw.memory = memory
        return self.put(torch.frombuffer(raw, dtype=torch.uint8)[:nbytes].view(dtype))

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        begin = tensor.untyped_storage().data_ptr()
        self._spans.append((begin, begin + tensor.untyped_storage().nbytes()))
        self._tensors.append(tensor)
        return tensor

    def holds(self, tensor: torch.Tensor) -> bool:
        return any(begin <= tensor.data_ptr() < end for begin, end in self._spans)


def install(everything: bool = False) -> MockedGpu:
    """From now on, in this process, tensors that were put on it count as CUDA tensors; or all do."""
    mocked = MockedGpu()
    gpu.of = lambda tensor: mocked if everything or mocked.holds(tensor) else None
    return mocked
