"""`pyallreduce doctor`: tells what is there, and what is not, and fails for neither."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_packaging import WITHOUT_TORCH

import pyallreduce
from pyallreduce import _core, device
from pyallreduce.__main__ import main
from pyallreduce.cli import doctor

PLAIN_ENV = {k: v for k, v in os.environ.items() if not k.startswith("PYALLREDUCE_")}
SECTIONS = [
    "pyallreduce", "environment", "python", "torch", "cpu", "shared memory", "mpi4py", "cuda runtime",
    "gpus", "nccl",
]  # fmt: skip


def examined(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    report: dict[str, Any] = json.loads(captured.out)
    assert list(report) == SECTIONS
    return report


def test_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    report = examined(capsys)
    assert report["pyallreduce"]["version"] == pyallreduce.__version__
    assert report["pyallreduce"]["cuda_kernels"] == _core.has_cuda
    assert report["torch"] == {"version": torch.__version__, "cuda": torch.version.cuda}
    assert report["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert report["cpu"]["used"] in report["cpu"]["instruction_sets"]
    assert report["shared memory"] == {"segments": "memfd", "deaths": "pidfd"}


def test_text_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    report = examined(capsys)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name, section in report.items():
        assert f"{name} " in text
        for key in section:
            assert f"{key}: " in text
    assert f"version: {pyallreduce.__version__}" in text


def test_an_absent_library_is_no_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYALLREDUCE_NCCL", "/nowhere/libnccl.so.2")
    monkeypatch.setenv("PYALLREDUCE_CUDART", "/nowhere/libcudart.so.13")
    report = examined(capsys)
    assert "PYALLREDUCE_NCCL=/nowhere/libnccl.so.2" in report["nccl"]["absent"]
    assert "PYALLREDUCE_CUDART=/nowhere" in report["gpus"]["absent"]
    assert report["environment"]["PYALLREDUCE_NCCL"] == "/nowhere/libnccl.so.2"


def test_a_misspelt_variable_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYALLREDUCE_NCLL", "1")
    assert (
        "unknown environment variable PYALLREDUCE_NCLL" in examined(capsys)["environment"]["absent"]
    )


def test_refused_system_calls_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert doctor.shared_memory() == {"segments": "unnamed files", "deaths": "pipes"}


def test_without_torch() -> None:
    blocked = WITHOUT_TORCH.split("import pyallreduce")[0]
    script = (
        f"{blocked}\nfrom pyallreduce.__main__ import main\nsys.exit(main(['doctor', '--json']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], env=PLAIN_ENV, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["torch"] == {"absent": "torch is not there"}


def test_folders_of_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "nvidia" / "nccl" / "lib" / "libnccl.so.2"
    library.parent.mkdir(parents=True)
    library.touch()
    info = tmp_path / "nvidia_nccl_cu99-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-nccl-cu99\nVersion: 1\n")
    (info / "RECORD").write_text("nvidia/nccl/lib/libnccl.so.2,,\nnvidia/nccl/include/nccl.h,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = device.folders_of(("no-such-package", "nvidia-nccl-cu99"), "libnccl.so.")
    assert found == [str(library.parent)]
