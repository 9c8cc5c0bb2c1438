"""``pyallreduce doctor``: what this installation and this machine offer."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from pyallreduce import __version__, _core, device
from pyallreduce.errors import Error

DESCRIPTION = """\
Says what this installation and this machine offer: versions, instruction sets, GPUs, which NCCL and which CUDA runtime
are used and where they were found, what shared memory is made of. What is absent is said, and is no failure: the exit
code is 0.
"""
Section = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Returns 0."""
    report = examine()
    print(json.dumps(report, indent=1) if options.json else as_text(report))
    return 0


def examine() -> dict[str, Section]:
    """JSON-able, by section. What is absent is a section with ``absent``: why."""
    sections: dict[str, Callable[[], Mapping[str, Any]]] = {
        "pyallreduce": installation,
        "environment": environment,
        "python": lambda: {
            "version": platform.python_version(),
            "platform": platform.platform(),
        },
        "torch": torch_version,  # before the libraries that it loads
        "cpu": cpu,
        "shared memory": shared_memory,
        "mpi4py": lambda: {"version": metadata.version("mpi4py")},
        "cuda runtime": device.find_cuda_runtime,
        "gpus": gpus,
        "nccl": device.find_nccl,
    }
    return {name: present(section) for name, section in sections.items()}


def present(section: Callable[[], Mapping[str, Any]]) -> Section:
    try:
        return dict(section())
    except metadata.PackageNotFoundError as error:
        return {"absent": f"{error.name} is not installed"}
    except (Error, ImportError, OSError) as error:
        return {"absent": str(error)}


def installation() -> Section:
    return {
        "version": __version__,
        "folder": os.path.dirname(_core.__file__),
        "cuda_kernels": _core.has_cuda,
    }


def environment() -> Section:
    """The variables that are set. Error if one of them is unknown or cannot be read."""
    _core.read_env()
    return {name: value for name, value in os.environ.items() if name.startswith("PYALLREDUCE_")}


def torch_version() -> Section:
    import torch

    return {"version": torch.__version__, "cuda": torch.version.cuda}


def cpu() -> Section:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "instruction_sets": _core.kernels.isas(),
        "used": _core.kernels.active_isa(),
    }


def shared_memory() -> Section:
    """What segments are made of, and by what a death is noticed (csrc/memory)."""
    return {
        "segments": "memfd" if works(lambda: os.memfd_create("doctor")) else "unnamed files",
        "deaths": "pidfd" if works(lambda: os.pidfd_open(os.getpid())) else "pipes",
    }


def works(make_descriptor: Callable[[], int]) -> bool:
    try:
        os.close(make_descriptor())
    except OSError:
        return False
    return True


def gpus() -> Section:
    """Names are torch's; the number is that of the runtime that the core uses."""
    count = device.find_cuda_runtime()["devices"]
    section: Section = {"count": count}
    if count:
        import torch

        if torch.cuda.is_available():
            section["names"] = [torch.cuda.get_device_name(i) for i in range(count)]
    return section


def as_text(report: Mapping[str, Section]) -> str:
    width = max(map(len, report))
    lines = []
    for name, section in report.items():
        facts = [f"{key}: {in_words(value)}" for key, value in section.items()] or ["-"]
        first, *rest = "\n".join(facts).splitlines()
        lines.append(f"{name:<{width}}  {first}")
        lines += [f"{'':<{width}}  {line}" for line in rest]
    return "\n".join(lines)


def in_words(value: object) -> str:
    match value:
        case None | []:
            return "none"
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(map(str, value))
    return str(value)
