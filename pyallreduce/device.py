"""What a GPU needs, found at run time: the CUDA runtime and NCCL. Works without either, and without torch."""

from __future__ import annotations

import os
from importlib import metadata

from pyallreduce import _core

# Packages that bring the library, newest first, and the name of its file.
NCCL = (("nvidia-nccl-cu13", "nvidia-nccl-cu12"), "libnccl.so.")
CUDA_RUNTIME = (
    ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12"),
    "libcudart.so.",
)


def find_cuda_runtime() -> _core.device._Runtime:
    """The first there is: PYALLREDUCE_CUDART, torch's, an installed package's, the system's. Error if none."""
    return _core.device.cuda_runtime(folders_of(*CUDA_RUNTIME))


def find_nccl() -> _core.device._Nccl:
    """The first there is: PYALLREDUCE_NCCL, torch's, an installed package's, the system's. Error if none."""
    return _core.device.nccl(folders_of(*NCCL))


def folders_of(packages: tuple[str, ...], file: str) -> list[str]:
    """Where those of ``packages`` that are installed have a file whose name begins with ``file``."""
    folders = []
    for package in packages:
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        folders += [os.path.dirname(path.locate()) for path in files if path.name.startswith(file)]
    return folders
