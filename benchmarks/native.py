"""The C++ side: compiles the floors and microbenchmarks, and runs them as sources.

Everything goes to build/bench, and is compiled again when a source is newer. ``-march=native``: a floor is what this
machine allows; the core's own files keep the flags of CMakeLists.txt.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.harness import HERE, ROOT, Block, evict_bytes

BUILD = ROOT / "build" / "bench"
CSRC = ROOT / "csrc"
FLAGS = [
    "-std=c++20",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]
COMPILE_DEADLINE_S = 300.0
BLOCK_DEADLINE_S = 120.0


class NativeError(RuntimeError):
    """A program could not be compiled, or did not answer."""


def _compile(command: list[str], output: Path, sources: list[Path]) -> Path:
    newest = max(source.stat().st_mtime for source in sources)
    if output.exists() and output.stat().st_mtime > newest:
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first: an interrupted compiler must leave nothing that looks finished.
    unfinished = output.with_name(f"{os.getpid()}-{output.name}")
    done = subprocess.run(
        [*command, "-o", str(unfinished)],
        capture_output=True,
        text=True,
        timeout=COMPILE_DEADLINE_S,
    )
    if done.returncode != 0:
        raise NativeError(f"{' '.join(command)}\n{done.stderr}")
    return unfinished.replace(output)


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise NativeError("no C++ compiler: neither CXX nor g++ nor clang++")
    return found


def floor_program(name: str) -> Path:
    source = HERE / "floors" / f"{name}.cpp"
    command = [compiler(), *FLAGS, str(source)]
    return _compile(command, BUILD / name, [source, *(HERE / "floors").glob("*.h")])


def core_program(name: str) -> Path:
    """A program of micro/, linked with the core's own sources."""
    source = HERE / "micro" / f"{name}.cpp"
    headers = [*CSRC.rglob("*.h"), *(HERE / "floors").glob("*.h"), source]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda s: _core_object(s, headers), _core_sources()))
    command = [compiler(), *FLAGS, f"-I{CSRC}", str(source)]
    command += [*map(str, objects), "-pthread"]
    return _compile(command, BUILD / name, [source, *objects])


def _core_sources() -> list[Path]:
    """As CMakeLists.txt lists them."""
    text = (ROOT / "CMakeLists.txt").read_text()
    library = re.search(r"add_library\(pyallreduce_core\s+STATIC(.*?)\)", text, re.S)
    if library is None:
        raise NativeError("CMakeLists.txt lists no pyallreduce_core")
    return [ROOT / name for name in re.findall(r"csrc/\S+\.cc", library.group(1))]


def _core_object(source: Path, headers: list[Path]) -> Path:
    isa = {
        "avx2": ["-mavx2", "-mf16c"],
        "avx512": [f"-mavx512{x}" for x in ("f", "bw", "dq", "vl")]
        + ["-mf16c", "-mprefer-vector-width=512"],
    }
    flags = [
        "-std=c++20",
        "-O3",
        "-fPIC",
        "-ffp-contract=off",
        f"-I{CSRC}",
        *isa.get(source.stem, []),
    ]
    output = BUILD / "core" / ("-".join(source.relative_to(CSRC).with_suffix(".o").parts))
    return _compile([compiler(), *flags, "-c", str(source)], output, [source, *headers])


class Program:
    """A program that measures on command; see floors/host.h for what it reads and answers. ``methods`` names what it
    measures, in its order."""

    def __init__(
        self,
        methods: Sequence[str],
        path: Path,
        mode: str,
        ranks: int,
        nbytes: int,
        cold: bool = False,
    ) -> None:
        self.methods = tuple(methods)
        self._cold = cold
        evict = evict_bytes() if cold else 0
        command = [str(path), str(ranks), str(nbytes), mode, str(evict)]
        self._name = " ".join([path.name, *command[1:]])
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._unread = b""

    def block(self, method: str, calls: int, first: int) -> Block:
        start = time.monotonic()
        assert self._process.stdin is not None
        command = f"{calls} {int(self._cold)} {first} {self.methods.index(method)}\n"
        self._process.stdin.write(command.encode())
        self._process.stdin.flush()
        lines = [self._line(start + BLOCK_DEADLINE_S).split() for _ in range(calls + 1)]
        *times, (word, wrong) = lines
        assert word == b"wrong", word
        return Block(
            [float(slowest) for slowest, _ in times],
            [float(rank0) for _, rank0 in times],
            int(wrong),
            time.monotonic() - start,
        )

    def _line(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        while b"\n" not in self._unread:
            left_s = max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left_s)[0]:
                raise NativeError(f"{self._name} did not answer")
            more = os.read(self._process.stdout.fileno(), 1 << 16)
            if not more:
                raise NativeError(f"{self._name} ended with {self._process.wait(10)}")
            self._unread += more
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
