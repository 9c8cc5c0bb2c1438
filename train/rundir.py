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
from pathlib import Path
from typing import Any

import torch

import pyallreduce as par
from train import checkpoint, launch
from train.collective import Failure, by_rank_0
from train.config import Config

CHECKPOINTS = "checkpoints"
_FILE = re.compile(r"step_(\d+)\.pt")
# Whose versions a run records: what computes, decodes and draws.
PACKAGES = (
    *("pyallreduce", "torch", "torchvision", "numpy", "Pillow", "simplejpeg", "torchcodec"),
    *("scikit-learn", "safetensors", "matplotlib", "rich"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """The paths exist on rank 0 only, which alone touches the disk."""

    path: Path | None
    resumed_from: Path | None

    def file(self, name: str) -> Path:
        assert self.path is not None
        return self.path / name

    def write_json(self, name: str, value: Any) -> None:
        """Whole or not at all."""
        temporary = self.file(f".{Path(name).name}.tmp")
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.file(name))

    def store(self, content: dict[str, Any], keep: int) -> None:
        """Write a checkpoint, point to it, and remove what is older than the newest `keep`.

        The one with the lowest held-out error stays too. Failure, with the last good file, when the
        disk does not take it.
        """
        assert self.path is not None
        folder = self.path / CHECKPOINTS
        path = folder / f"step_{content['step']:06d}.pt"
        try:
            folder.mkdir(exist_ok=True)
            checkpoint.write(path, content)
            self._point_to(path, content)
            best = self._best()
            for old in checkpoint_files(self.path)[keep:]:
                if old.name != best:
                    old.unlink()
        except OSError as error:
            good = next(iter(checkpoint_files(self.path)), None)
            raise Failure(
                f"the checkpoint {path} cannot be written ({error.strerror or error}); "
                + (f"the last good one is {good}" if good else "there is none before it")
                + ". Make room or give another --output-dir, then continue with --resume"
            ) from None

    def _point_to(self, path: Path, content: dict[str, Any]) -> None:
        """For people and scripts; resuming looks at the files themselves."""
        errors, step = content["errors"], content["step"]
        pointer = {"file": path.name, "step": step}
        if errors and content["evaluated"] == step:
            newest = max(errors)
            pointer |= {"epoch": newest, "test_error": errors[newest]}
            if errors[newest] <= min(errors.values()):
                self.write_json(f"{CHECKPOINTS}/best.json", pointer)
        self.write_json(f"{CHECKPOINTS}/last.json", pointer)

    def _best(self) -> str | None:
        file = self.file(f"{CHECKPOINTS}/best.json")
        return json.loads(file.read_text(encoding="utf-8"))["file"] if file.exists() else None


def checkpoint_files(run: Path) -> list[Path]:
    """Those of a run directory, newest first."""
    folder = run / CHECKPOINTS
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((f for f in found if _FILE.fullmatch(f.name)), key=_step_of, reverse=True)


def checkpoints_in(given: Path) -> list[Path]:
    """Newest first; a file is its own only one. UsageError for a directory without any."""
    if not given.is_dir():
        return [given]
    if found := checkpoint_files(given):
        return found
    raise par.UsageError(
        f"{given} has no checkpoint; accepted: a run directory with {CHECKPOINTS}/step_N.pt, or one "
        "of these files"
    )


def checkpoints_to_resume(cfg: Config) -> list[Path]:
    """What --resume asks for, newest first; nothing for a new run."""
    if cfg.resume is None:
        return []
    if cfg.resume == "auto":
        runs = [checkpoint_files(run) for run in _runs_named(Path(cfg.output_dir), _name(cfg))]
        return next((files for files in reversed(runs) if files), [])
    return checkpoints_in(Path(cfg.resume))


def run_of(file: Path) -> Path | None:
    """The run directory that a checkpoint lies in; None for a copy elsewhere."""
    run = file.parent.parent
    return run if file.parent.name == CHECKPOINTS and (run / "config.json").exists() else None


def open_run(cfg: Config, comm: par.Communicator, resume_from: Path | None) -> Run:
    """Collective: the directory of the checkpoint if that is a run's, else a new one; for
    --test-only always a new one.

    Its later checkpoints, damaged or of iterations that will be run again, are set aside.
    UsageError on every rank when it cannot be written.
    """
    path = by_rank_0(comm, lambda: os.fsencode(_directory(cfg, resume_from)))
    return Run(Path(os.fsdecode(path)) if comm.rank == 0 else None, resume_from)


def open_group(cfg: Config, comm: par.Communicator) -> Run:
    """Collective: the directory for the runs of --runs; with --resume auto the newest of the name."""

    def directory() -> bytes:
        found = _runs_named(Path(cfg.output_dir), _name(cfg)) if cfg.resume else []
        return os.fsencode(found[-1] if found else _directory(cfg, None))

    path = by_rank_0(comm, directory)
    return Run(Path(os.fsdecode(path)) if comm.rank == 0 else None, None)


def _directory(cfg: Config, resume_from: Path | None) -> Path:
    root = Path(cfg.output_dir)
    try:
        if resume_from and not cfg.test_only and (run := run_of(resume_from)):
            if not os.access(run, os.W_OK):
                raise PermissionError(13, "Permission denied", str(run))
            for later in checkpoint_files(run):
                if _step_of(later) > _step_of(resume_from):
                    later.rename(later.with_name(f"{later.name}.unused"))
            return run
        root.mkdir(parents=True, exist_ok=True)
        return _make_new(root, _name(cfg))
    except OSError as error:
        raise par.UsageError(
            f"--output-dir: given {cfg.output_dir!r}, where a run directory cannot be written "
            f"({error.strerror}: {error.filename}); accepted: a directory with write permission; "
            "give another one"
        ) from None


def _step_of(file: Path) -> int:
    match = _FILE.fullmatch(file.name)
    return int(match[1]) if match else 0


def _name(cfg: Config) -> str:
    return cfg.name or cfg.preset


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
