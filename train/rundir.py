"""The directory of one run: never another run's, described by configuration and environment."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pyallreduce as par
from train import launch
from train.config import Config

CHECKPOINT = "checkpoint.pt"
# Whose versions a run records: what computes, decodes and draws.
PACKAGES = (
    *("pyallreduce", "torch", "torchvision", "numpy", "Pillow", "simplejpeg", "torchcodec"),
    *("scikit-learn", "safetensors", "matplotlib", "rich"),
)
_NOTHING, _SOMETHING, _REFUSED = range(3)


@dataclasses.dataclass(frozen=True)
class Run:
    """The paths exist on rank 0 only, which alone touches the disk."""

    path: Path | None
    resumed_from: Path | None

    @property
    def checkpoint(self) -> Path | None:
        """The file that this run writes."""
        return self.path / CHECKPOINT if self.path else None

    def file(self, name: str) -> Path:
        assert self.path is not None
        return self.path / name

    def write_json(self, name: str, value: Any) -> None:
        """Whole or not at all."""
        temporary = self.file(f".{name}.tmp")
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.file(name))


def find_checkpoint(cfg: Config, comm: par.Communicator) -> tuple[Path | None, bool]:
    """Collective: the checkpoint that --resume asks for (rank 0), and whether there is one (all)."""
    return _by_rank_0(comm, lambda: _checkpoint_to_resume(cfg))


def open_run(cfg: Config, comm: par.Communicator, resume_from: Path | None) -> Run:
    """Collective: the directory of the checkpoint if that is a run's, else a new one.

    UsageError on every rank when it cannot be written; only rank 0's has the reason.
    """
    path, _ = _by_rank_0(comm, lambda: _directory(cfg, resume_from))
    return Run(path, resume_from)


def open_group(cfg: Config, comm: par.Communicator) -> Run:
    """Collective: the directory for the runs of --runs; with --resume auto the newest of the name."""

    def directory() -> Path:
        found = _runs_named(Path(cfg.output_dir), _name(cfg)) if cfg.resume else []
        return found[-1] if found else _directory(cfg, None)

    path, _ = _by_rank_0(comm, directory)
    return Run(path, None)


def _by_rank_0(
    comm: par.Communicator, action: Callable[[], Path | None]
) -> tuple[Path | None, bool]:
    """Rank 0's answer there, on every rank whether there is one; its UsageError ends all ranks."""
    answer = refusal = None
    verdict = torch.tensor([_NOTHING])
    if comm.rank == 0:
        try:
            answer = action()
            verdict.fill_(_NOTHING if answer is None else _SOMETHING)
        except par.UsageError as error:
            refusal = error
            verdict.fill_(_REFUSED)
    comm.broadcast(verdict, root=0)
    if verdict.item() == _REFUSED:
        raise refusal or par.UsageError("refused by rank 0, which says why")
    return answer, verdict.item() == _SOMETHING


def _directory(cfg: Config, resume_from: Path | None) -> Path:
    root = Path(cfg.output_dir)
    try:
        if resume_from and (resume_from.parent / "config.json").exists():
            if not os.access(resume_from.parent, os.W_OK):
                raise PermissionError(13, "Permission denied", str(resume_from.parent))
            return resume_from.parent
        root.mkdir(parents=True, exist_ok=True)
        return _make_new(root, _name(cfg))
    except OSError as error:
        raise par.UsageError(
            f"--output-dir: given {cfg.output_dir!r}, where a run directory cannot be written "
            f"({error.strerror}: {error.filename}); accepted: a directory with write permission; "
            "give another one"
        ) from None


def _name(cfg: Config) -> str:
    return cfg.name or cfg.preset


def _checkpoint_to_resume(cfg: Config) -> Path | None:
    if cfg.resume is None:
        return None
    if cfg.resume == "auto":
        runs = _runs_named(Path(cfg.output_dir), _name(cfg))
        found = [run / CHECKPOINT for run in runs if (run / CHECKPOINT).exists()]
        return found[-1] if found else None
    return checkpoint_in(Path(cfg.resume))


def checkpoint_in(given: Path) -> Path:
    """The checkpoint of a run directory; a file is its own."""
    return given / CHECKPOINT if given.is_dir() else given


def _runs_named(root: Path, name: str) -> list[Path]:
    """`name`, `name-2`, `name-3`, ... in the order they were made."""
    if not root.is_dir():
        return []
    pattern = re.compile(re.escape(name) + r"(?:-(\d+))?")
    found = [
        (int(match[1] or 1), entry)
        for entry in root.iterdir()
        if entry.is_dir() and (match := pattern.fullmatch(entry.name))
    ]
    return [entry for _, entry in sorted(found)]


def _make_new(root: Path, name: str) -> Path:
    """mkdir decides, so two runs started at once cannot take the same directory."""
    number = 1
    while True:
        path = root / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def environment(comm: par.Communicator) -> dict[str, Any]:
    """What is needed to repeat the run elsewhere: versions, machine, launch, commit."""
    return {
        "command": command_line(),
        "launcher": launch.launched_by(os.environ),
        "ranks": comm.size,
        "nodes": comm.num_nodes,
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_process": torch.get_num_threads(),
        "cpu": _cpu_model(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "variables": {
            k: v
            for k, v in sorted(os.environ.items())
            if k.startswith(("PYALLREDUCE_", "OMP_", "MKL_"))
        },
    }


def command_line() -> str:
    return shlex.join(["python", "-m", "train", *sys.argv[1:]])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _commit() -> str | None:
    """The commit of the source tree this package runs from, if it is one."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
