"""What the figures of a GPU machine depend on, as one row. Changes no setting of the card; names no host and no serial.

Fails where torch sees no GPU, except with ``--dry-run``.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu.program import emit, search_path

CARD = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "compute_mode",
    "mig.mode.current",
    "ecc.mode.current",
)
COMPILERS = ("nvcc", "g++", "cmake", "ninja")
DEBUGGERS = ("compute-sanitizer", "ncu", "nsys")
PACKAGES = ("torchvision", "numpy", "scikit-build-core", "pybind11", "pytest", "hypothesis")


def said(*command: str) -> str | None:
    """What a program prints, or None where it is missing or fails."""
    program = shutil.which(command[0], path=search_path())
    if program is None:
        return None
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=15)
    return done.stdout.strip() if done.returncode == 0 else None


def card() -> dict[str, str] | None:
    """nvidia-smi's facts of the first GPU."""
    line = said("nvidia-smi", "-i", "0", f"--query-gpu={','.join(CARD)}", "--format=csv,noheader")
    return None if line is None else dict(zip(CARD, line.split(", "), strict=True))


def version_of(tool: str) -> str | None:
    """The line of ``--version`` that has a version in it."""
    text = said(tool, "--version")
    if text is None:
        return None
    numbered = [line.strip() for line in text.splitlines() if re.search(r"\d+\.\d+", line)]
    return numbered[0] if numbered else text.splitlines()[0]


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def host() -> dict[str, Any]:
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu.group(1).strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
    }


def torch_sees() -> dict[str, Any]:
    """Versions, and the first GPU as the CUDA runtime describes it."""
    import torch

    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    about: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": None if nccl is None else ".".join(map(str, nccl)),
        "gpus": torch.cuda.device_count(),
    }
    if about["gpus"]:
        gpu = torch.cuda.get_device_properties(0)
        about["gpu"] = {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
            "l2_bytes": gpu.L2_cache_size,
        }
    return about


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    seen = torch_sees()
    tools = {tool: version_of(tool) for tool in (*COMPILERS, *DEBUGGERS)}
    packages = {package: _installed(package) for package in PACKAGES}
    gpu = seen["gpu"]["name"] if "gpu" in seen else "no GPU"
    absent = [name for name, found in (tools | packages).items() if found is None]
    emit(
        **host(),
        **seen,
        card=card(),
        tools=tools,
        packages=packages,
        says=f"{gpu}, torch {seen['torch']}, NCCL {seen['nccl']}; missing: {', '.join(absent) or 'nothing'}",
    )
    if not seen["gpus"] and not given.dry_run:
        print("torch sees no GPU here; --dry-run shows on the CPU what would run")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
