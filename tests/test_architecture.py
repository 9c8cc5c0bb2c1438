"""The house keeps its walls: rooms depend only as DESIGN says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import pyallreduce

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"

# What each room may include, besides itself.
ALLOWED = {
    "base": set(),
    "memory": {"base"},
    "device": {"base"},
    "kernels": {"base"},
    "schedules": {"base"},
    "transport": {"base", "memory"},
    "group": {"base", "memory", "device", "kernels", "schedules", "transport"},
    "engine": {"base", "device", "group"},
    "bindings": {
        "base",
        "memory",
        "device",
        "kernels",
        "schedules",
        "transport",
        "group",
        "engine",
    },
}
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cc", ".cu", ".cuh"))
PYTHON = sorted(p for room in ("pyallreduce", "train") for p in (ROOT / room).rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(CSRC).parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_includes_follow_the_arrow(path: Path) -> None:
    room = room_of(path)
    for included in re.findall(r'#include "([^"]+)"', path.read_text()):
        other = included.split("/")[0]
        assert other in ALLOWED[room] | {room}, f"{room} must not know {included}"


def test_every_room_is_known_and_every_source_is_built() -> None:
    assert {room_of(p) for p in SOURCES} == set(ALLOWED)
    listed = (ROOT / "CMakeLists.txt").read_text()
    for path in SOURCES:
        if path.suffix in (".cc", ".cu"):
            assert str(path.relative_to(ROOT)) in listed, path


def test_torch_python_and_cuda_stay_in_their_rooms() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert "torch/" not in text, path
        assert ("pybind11" in text) <= (room_of(path) == "bindings"), path
        assert ("Python.h" in text) <= (room_of(path) == "bindings"), path
        assert bool(re.search(r"#include <cuda", text)) <= ("kernels/cuda" in str(path)), path


def test_schedules_are_pure() -> None:
    for path in SOURCES:
        if room_of(path) == "schedules":
            text = re.sub(r"//.*", "", path.read_text())
            assert not re.search(r"std::thread|std::atomic|void\s*\*|#if|std::mutex", text), path


def test_the_environment_is_read_in_one_place() -> None:
    for path in SOURCES:
        if path.name != "env.cc":
            assert not re.search(r"\bgetenv\b|\benviron\b", path.read_text()), path


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_imports_follow_the_arrow(path: Path) -> None:
    imports = imports_of(path)
    if path.is_relative_to(ROOT / "pyallreduce"):
        assert not any(name.split(".")[0] in ("train", "benchmarks") for name in imports)
    else:  # only public names
        ours = {name for name in imports if name.split(".")[0] == "pyallreduce"}
        public = {"pyallreduce", *(f"pyallreduce.{name}" for name in pyallreduce.__all__)}
        assert ours <= public, ours - public


def test_sources_name_no_path_of_a_machine() -> None:
    for path in [*SOURCES, *PYTHON, *sorted((ROOT / "tests").glob("*.py"))]:
        assert not re.search(r"/(home|root|Users|work)/\w", path.read_text()), path
