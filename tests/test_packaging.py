"""Both builds, the wheel's contents, and an import without torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pyallreduce
from pyallreduce import _core

ROOT = Path(__file__).parent.parent
WITHOUT_TORCH = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("torch is not there")
sys.meta_path.insert(0, Blocker())
import pyallreduce as par
schedule = par.schedules.ring(0, 4)
print(schedule.size, len(schedule.steps))
try:
    par.init
except ModuleNotFoundError:
    print("lazy")
"""


def path_without_nvcc() -> str:
    """PATH without the folders that hold an nvcc; compilers and cmake live elsewhere."""
    kept = [d for d in os.environ["PATH"].split(os.pathsep) if not (Path(d) / "nvcc").exists()]
    return os.pathsep.join(kept)


def configure(
    tmp_path: Path, *settings: str, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip(
            "no cmake on PATH (the wheel build brings its own): the configure cases cannot run"
        )
    command = [cmake, "-S", str(ROOT), "-B", str(tmp_path / "build"), *settings]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)


def test_import_without_torch() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=60
    )
    assert result.stdout.split() == ["4", "6", "lazy"], result.stderr


def test_public_names_are_documented_and_load() -> None:
    for name in pyallreduce.__all__:
        value = getattr(pyallreduce, name)
        assert name == "__version__" or value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pyallreduce.nothing


def test_auto_compiles_cuda_exactly_when_nvcc_is_there() -> None:
    """The build under test is AUTO; without a GPU its device count is 0, whatever was compiled."""
    assert _core.has_cuda == (shutil.which("nvcc") is not None)
    assert _core.cuda_device_count() >= 0


def test_nvcc_hidden_builds_without_cuda(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_PATH")}
    env["PATH"] = path_without_nvcc()
    result = configure(tmp_path, env=env)
    assert "pyallreduce: CUDA kernels OFF" in result.stdout, result.stdout + result.stderr
    result = configure(tmp_path / "on", "-DPYALLREDUCE_CUDA=ON", env=env)
    assert result.returncode != 0
    assert "no nvcc >= 12.0 was found" in result.stderr


@pytest.mark.deadline(320)
def test_wheel_without_cuda(tmp_path: Path) -> None:
    """`pip wheel` with CUDA switched off: builds, holds what it should, and imports from where it was unpacked."""
    for tool in ("scikit_build_core", "pybind11"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed: a build without isolation cannot run")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-q",
         "-w", str(tmp_path), "-C", "cmake.define.PYALLREDUCE_CUDA=OFF",
         "-C", "cmake.build-type=Debug", "-C", "cmake.define.CMAKE_CXX_FLAGS_DEBUG=-O0",  # quick to compile
         "-C", f"build-dir={tmp_path / 'build'}"],
        check=True, timeout=300,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {"pyallreduce/py.typed", "pyallreduce/_core.pyi", "train/presets/digits.toml"} <= set(
        names
    )
    assert any(name.endswith("LICENSE") for name in names)
    assert not any(name.startswith(("tests", "csrc", "benchmarks")) for name in names)
    code = (
        "import pyallreduce as p; print(p.__file__, p._core.has_cuda, p._core.cuda_device_count())"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    where, has_cuda, devices = result.stdout.split()
    assert where.startswith(str(tmp_path))
    assert (has_cuda, devices) == ("False", "0")
    library = next((tmp_path / "site" / "pyallreduce").glob("_core*.so"))
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True).stdout
    assert "torch" not in needed
    assert "cuda" not in needed
