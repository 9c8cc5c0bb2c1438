"""``sanitize memcheck TESTS``: the GPU tests in TESTS under a tool of compute-sanitizer, looking at our kernels alone.

What the tool finds decides. Whether tests pass is decided elsewhere: some cannot under a tool that makes kernels slow.
First the tool must find a planted fault (planted.cu): where it does not, because it is missing or refuses the place
(some sandboxes hide what it needs), its silence proves nothing, and the check is skipped with what it said. torch
allocates without a cache here, or a write past a tensor's end would land in the cache's own memory, unseen.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.check import PYTEST, ROOT
from benchmarks.gpu.program import emit, row_of, search_path, skip

FOUND = 86  # exit code of the tool when it has found something
OPTIONS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}  # torch asks what may fail


def command_of(sanitizer: str, tool: str, program: list[str]) -> list[str]:
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *OPTIONS[tool]]
    return [*command, "--kernel-regex", "kns=pyar", *program]


def watched(command: list[str]) -> tuple[int, int | None, list[str]]:
    """Exit code, the number in the tool's summary, and what was printed; also printed here at once."""
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    return process.wait(), count_of(lines), lines


def count_of(lines: list[str]) -> int | None:
    """Errors of memcheck, hazards of racecheck; None without a summary."""
    found = [re.search(r"= (?:ERROR|RACECHECK) SUMMARY: (\d+)", line) for line in lines]
    return next((int(match.group(1)) for match in reversed(found) if match), None)


def outcomes_of(lines: list[str]) -> dict[str, int]:
    """How many tests passed, failed, were skipped: the last row of benchmarks/gpu/outcomes.py."""
    rows = [row for line in lines if (row := row_of(line)) is not None]
    return next((row["tests"] for row in reversed(rows) if "tests" in row), {})


def check_planted(sanitizer: str, nvcc: str, tool: str) -> tuple[int, int | None, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        program, source = f"{folder}/planted", str(Path(__file__).with_name("planted.cu"))
        subprocess.run([nvcc, "-arch=native", "-o", program, source], check=True)
        return watched(command_of(sanitizer, tool, [program, tool]))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("tool", choices=list(OPTIONS))
    parser.add_argument("tests")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    sanitizer, nvcc = (shutil.which(p, path=search_path()) for p in ("compute-sanitizer", "nvcc"))
    # Names with gpu in them: parameters and markers count.
    tests = [sys.executable, *PYTEST, "--gpu=require", "-k", "gpu", given.tests]
    if sanitizer is None:
        skip("no compute-sanitizer on PATH or in CUDA_HOME/bin")
    if nvcc is None:
        skip("no nvcc for the planted faults, without which a sanitizer's silence proves nothing")
    if given.dry_run:
        shown = " ".join(command_of("compute-sanitizer", given.tool, ["python", *tests[1:]]))
        emit(tool=given.tool, says=f"would run {shown}")
        return 0

    code, number, lines = check_planted(sanitizer, nvcc, given.tool)
    if code != FOUND or not number:
        last = lines[-1] if lines else "nothing"
        skip(f"{given.tool} does not find the planted fault here: exit code {code}, {last}")
    emit(tool=given.tool, planted=number)

    code, number, lines = watched(command_of(sanitizer, given.tool, tests))
    tests_run = outcomes_of(lines)
    passed, failed = tests_run.get("passed", 0), tests_run.get("failed", 0)
    found = "no summary" if number is None else f"{number} found"
    words = f"planted fault found; in our kernels, {passed + failed} tests: {found}"
    under = f" ({failed} failed under the tool)" if failed else ""
    emit(tool=given.tool, found=number, exit=code, tests=tests_run, says=words + under)
    return 0 if number == 0 and code != FOUND and passed else 1


if __name__ == "__main__":
    sys.exit(main())
