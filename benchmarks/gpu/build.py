"""Builds the package without network into an environment of its own, build/gpu-check/venv, and says what it built.

That environment borrows the packages of the Python that runs this; an installed pyallreduce, and other builds of this
tree, are left alone. With ``--installed`` nothing is built: what is installed is described, and what would be run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

from benchmarks.gpu.check import ROOT, WORK
from benchmarks.gpu.program import emit, search_path

# Of CMakeCache.txt: what bits and speed depend on.
OPTIONS = (
    "CMAKE_BUILD_TYPE",
    "CMAKE_CUDA_ARCHITECTURES",
    "CMAKE_CUDA_FLAGS",
    "CMAKE_CXX_FLAGS",
    "PYALLREDUCE_CUDA",
)
DESCRIBE = """
import json, sys
import pyallreduce._core as core
print(json.dumps({
    "has_cuda": core.has_cuda,
    "gpus": core.cuda_device_count(),
    "isa": core.kernels.active_isa(),
    "own": core.__file__.startswith(sys.prefix),
}))
"""


def make_environment(folder: Path) -> Path:
    """A fresh environment that finds, after its own packages, those of this one; its Python."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, symlinks=True, with_pip=False)
    borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages,) = folder.glob("lib/python*/site-packages")
    # One .pth: paths named in it are searched, but what *they* name in such files (an editable pyallreduce) is not.
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return folder / "bin" / "python"


def install_command(python: Path, cuda: str) -> list[str]:
    """Editable: tests and benchmarks run in the tree, whose pyallreduce/ would hide an installed one."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "--editable", str(ROOT)]
    command += ["-C", f"build-dir={WORK}/{{wheel_tag}}"]
    return [*command, "-C", f"cmake.define.PYALLREDUCE_CUDA={cuda}"]


def install(python: Path, cuda: str) -> int:
    env = {**os.environ, "PATH": search_path(), "PIP_ROOT_USER_ACTION": "ignore"}
    return subprocess.run(install_command(python, cuda), cwd=ROOT, env=env).returncode


def options_of(build: Path) -> dict[str, str]:
    """From the newest CMakeCache.txt and compiler files under the folder."""
    caches = sorted(build.glob("*/CMakeCache.txt"), key=lambda path: path.stat().st_mtime)
    if not caches:
        return {}
    lines = re.findall(r"^(\w+):\w+=(.*)$", caches[-1].read_text(), re.M)
    found = {name: value for name, value in lines if name in OPTIONS}
    for language in ("CXX", "CUDA"):
        for file in caches[-1].parent.glob(f"CMakeFiles/*/CMake{language}Compiler.cmake"):
            facts = dict(re.findall(r'^set\((\w+) "([^"]*)"\)', file.read_text(), re.M))
            name = facts.get(f"CMAKE_{language}_COMPILER_ID", "?")
            version = facts.get(f"CMAKE_{language}_COMPILER_VERSION", "?")
            found[f"{language} compiler"] = f"{name} {version}"
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true", help="do without CUDA if need be")
    parser.add_argument("--installed", action="store_true")
    given = parser.parse_args()
    start = time.monotonic()
    python, cuda = WORK / "venv" / "bin" / "python", "AUTO" if given.dry_run else "ON"
    if given.installed:
        shown = " ".join(install_command(python, cuda)).replace(str(ROOT), ".")
        print(f"not built; would run {shown}")
        python = Path(sys.executable)
    else:
        make_environment(WORK / "venv")
        if code := install(python, cuda):
            print(f"pip ended with {code}")
            return 1
    seconds = round(time.monotonic() - start, 1)
    described = subprocess.run(
        [str(python), "-P", "-c", DESCRIBE], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if described.returncode != 0:
        return 1
    facts = json.loads(described.stdout)
    cuda_words = f"CUDA kernels {'compiled' if facts['has_cuda'] else 'NOT compiled'}"
    emit(
        **facts,
        built=not given.installed,
        build_s=seconds,
        options={} if given.installed else options_of(WORK),
        says=f"{'installed' if given.installed else f'built in {seconds:.0f} s'}; {cuda_words}",
    )
    if not given.installed and not facts["own"]:
        print("the extension that Python finds is not the one that was built")
        return 1
    if not given.dry_run and not (facts["has_cuda"] and facts["gpus"]):
        print(f"the extension has no CUDA kernels, or sees no GPU: {facts}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
