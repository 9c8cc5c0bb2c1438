"""NCCL and the CUDA runtime without either: a mock in their place, and the search for the real ones."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from mocked import CPP, ROOT, compile_cpp

from pyallreduce import Error, _core
from pyallreduce.cli import doctor

PLAIN_ENV = {k: v for k, v in os.environ.items() if not k.startswith("PYALLREDUCE_")}


def core_library() -> Path:
    """The core as it was built for this Python (pyproject.toml: build-dir)."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = sorted(ROOT.glob(f"build/{python}-{python}-linux_*/libpyallreduce_core.a"))
    if not found:
        pytest.skip("build/ holds no libpyallreduce_core.a: install with `pip install -e .`")
    return found[-1]


PROGRAMS = ["nccl_hierarchy", "nccl", "device_side", "device"]


@pytest.fixture(scope="module")
def binaries(mocks: Path) -> Iterator[dict[str, Future[Path]]]:
    """Of PROGRAMS; while one runs, which is mostly waiting, the compiler is at work on the others."""
    core = core_library()

    def build(program: str) -> Path:
        compile_cpp(CPP / f"{program}.cpp", core, "-ldl", "-o", mocks / program)
        return mocks / program

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {program: pool.submit(build, program) for program in PROGRAMS}


@pytest.mark.deadline(240)
@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: str, mocks: Path, binaries: dict[str, Future[Path]]) -> None:
    """The tests in C++ also run under the sanitizers (`make sanitize`); here, without them, always."""
    binary = binaries[program].result()
    env = {**PLAIN_ENV, "TMPDIR": str(mocks)}
    result = subprocess.run([binary], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not list(mocks.glob("nccl-mock-*"))  # where its ranks have met


def test_the_search_from_python(mocks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYALLREDUCE_NCCL", str(mocks / "libnccl_mock.so"))
    found = _core.device.nccl()
    assert found == {
        "path": str(mocks / "libnccl_mock.so"),
        "how": "PYALLREDUCE_NCCL",
        "version": "2.30.7",
        "missing": [],
    }
    monkeypatch.setenv("PYALLREDUCE_NCCL", str(mocks / "libnccl_plain.so"))
    assert "ncclCommSplit" in _core.device.nccl()["missing"]
    monkeypatch.setenv("PYALLREDUCE_CUDART", str(mocks / "libnccl_mock.so"))
    runtime = _core.device.cuda_runtime()
    assert (runtime["version"], runtime["devices"]) == ("13.0", 8)
    report = doctor.examine()
    assert report["gpus"]["count"] == 8
    assert report["nccl"]["path"] == str(mocks / "libnccl_plain.so")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("libnccl_old.so", ["2.14.3", "older than 2.18.0", "pip install nvidia-nccl-cu13"]),
        ("libnccl_hollow.so", ["ncclAllReduce", "PYALLREDUCE_NCCL", "pip install"]),
        ("nowhere.so", ["PYALLREDUCE_NCCL=", "nowhere.so: cannot open"]),
    ],
)
def test_what_cannot_be_used_says_why(
    path: str, words: list[str], mocks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYALLREDUCE_NCCL", str(mocks / path))
    with pytest.raises(Error) as caught:
        _core.device.nccl()
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_torch_has_loaded_is_used() -> None:
    """In a process of its own: a library stays loaded."""
    script = """
import torch
from pyallreduce import _core
print(torch.version.cuda or "")
print(_core.device.nccl()["how"], _core.device.cuda_runtime()["how"], sep="|")
"""
    result = subprocess.run(
        [sys.executable, "-c", script], env=PLAIN_ENV, capture_output=True, text=True, timeout=100
    )
    cuda, _, how = result.stdout.partition("\n")
    if not cuda:
        pytest.skip("this torch was built without CUDA: it brings no NCCL")
    assert how.strip() == "already loaded|already loaded", result.stderr


def package_folder(name: str, inside: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    for place in spec.submodule_search_locations or [] if spec else []:
        if (found := Path(place) / inside).exists():
            return found
    return None


CHECKED = """
#include <stddef.h>
#include <nccl.h>
#include "group/nccl_api.h"
using namespace pyar;
static_assert(sizeof(ncclUniqueId) == sizeof(NcclUniqueId));
#define SAME(ours, theirs) static_assert(offsetof(NcclConfig, ours) == offsetof(ncclConfig_t, theirs))
SAME(size, size); SAME(magic, magic); SAME(version, version); SAME(blocking, blocking);
SAME(cga_cluster_size, cgaClusterSize); SAME(min_ctas, minCTAs); SAME(max_ctas, maxCTAs);
SAME(net_name, netName); SAME(split_share, splitShare);
#if NCCL_VERSION_CODE >= 22700
SAME(traffic_class, trafficClass);
#endif
static_assert(NcclConfig{}.magic == NCCL_API_MAGIC);
static_assert(NcclConfig::kUndefined == NCCL_CONFIG_UNDEF_INT);
static_assert(kNcclSuccess == ncclSuccess && kNcclInProgress == ncclInProgress);
static_assert(nccl_dtype(DType::kUInt8) == ncclUint8 && nccl_dtype(DType::kInt32) == ncclInt32);
static_assert(nccl_dtype(DType::kInt64) == ncclInt64 && nccl_dtype(DType::kFloat16) == ncclFloat16);
static_assert(nccl_dtype(DType::kFloat32) == ncclFloat32 && nccl_dtype(DType::kFloat64) == ncclFloat64);
static_assert(nccl_dtype(DType::kBFloat16) == ncclBfloat16);
static_assert(nccl_op(Op::kSum) == ncclSum && nccl_op(Op::kProd) == ncclProd);
static_assert(nccl_op(Op::kMin) == ncclMin && nccl_op(Op::kMax) == ncclMax);
"""
STUBS = {"cuda_runtime.h": "typedef struct CUstream_st* cudaStream_t;", "cuda_fp16.h": ""}


def test_declarations_are_those_of_the_installed_header(tmp_path: Path) -> None:
    """nccl.h wants CUDA's headers for the name of a stream's type alone."""
    header = package_folder("nvidia", "nccl/include/nccl.h")
    if header is None:
        pytest.skip("no nccl.h: the package nvidia-nccl-cu13 is not installed")
    for name, text in STUBS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "check.cc").write_text(CHECKED)
    compile_cpp("-fsyntax-only", f"-I{tmp_path}", f"-I{header.parent}", tmp_path / "check.cc")
