"""``make gpu-check``: builds, tests and measures on a machine with a GPU, without network, in at most eight minutes.

A *stage* is a program in a process group of its own, with time of its own; the lines of JSON that it prints are its
*rows*. The result file is replaced whenever a stage begins, ends or prints a row: whatever fails, hangs or is killed
later, what was found is there. Needs nothing but the standard library: it runs before anything is built.

    python3 -m benchmarks.gpu.check --out FILE [--dry-run] [--installed] [--only STAGE ...]

``--dry-run`` is for machines without a GPU: each stage runs in small form on the CPU, or says what it would do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.program import LIMIT, SKIPPED, die_with_parent, row_of

ROOT = Path(__file__).parent.parent.parent
WORK = ROOT / "build" / "gpu-check"  # the private environment, and the build of its extension
VERSION = 1  # of the result file
BUDGET_S = 470.0  # of the promised 480: starting, ending and writing take the rest
LEAST_S = 1.0  # a stage with less than this left is not begun
GRACE_S = 2.0  # between asking a stage where it is and killing it
TAIL_LINES, TAIL_CHARACTERS = 60, 8000

KERNEL_TESTS = "tests/test_cuda_kernels.py"
PYTEST = ("-m", "pytest", "-p", "benchmarks.gpu.outcomes", "-p", "no:cacheprovider", "-q")
PYTEST += ("--continue-on-collection-errors",)

# A stage that is ended shows its stacks; no plugin of pytest that a machine happens to have takes part.
ENVIRONMENT = {"PYTHONFAULTHANDLER": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

Result = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """``arguments`` are Python's. ``seconds`` are its own; what earlier stages leave over comes on top.

    A stage runs when all it ``needs`` have passed; those that need the build run with what it built. Without its
    ``file`` it is not there yet. ``dry`` is added in a dry run. ``not_yet``: why there is only a place for it.
    """

    name: str
    arguments: tuple[str, ...] = ()
    seconds: float = 0.0
    needs: tuple[str, ...] = ()
    file: str = ""
    dry: tuple[str, ...] = ("--dry-run",)
    not_yet: str = ""


def _program(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"benchmarks.gpu.{name}", *arguments)


# The sum of seconds is below BUDGET_S: the last stage has its time even if all before it overrun.
STAGES = (
    Stage("machine", _program("machine"), 40),
    Stage("build", _program("build"), 100, needs=("machine",)),
    Stage(
        "kernel tests",
        (*PYTEST, "--gpu=require", KERNEL_TESTS),
        55,
        needs=("build",),
        file=KERNEL_TESTS,
        dry=("--gpu=skip", "-k", "gpu"),
    ),
    Stage(
        "gpu tests",
        (*PYTEST, "--gpu=require", "-m", "gpu", "tests", f"--ignore={KERNEL_TESTS}"),
        30,
        needs=("build",),
        dry=("--gpu=skip",),
    ),
    Stage(
        "kernels",
        _program("kernels"),
        70,
        needs=("build",),
        file="benchmarks/gpu/kernels.py",
    ),
    Stage("training", _program("training"), 60, needs=("machine", "build")),
    Stage("ranks on one GPU", _program("ranks_on_one_gpu"), 35, needs=("machine",)),
    Stage("two ranks train on one GPU", _program("two_ranks"), 30, needs=("build",)),
    Stage(
        "memcheck",
        _program("sanitize", "memcheck", KERNEL_TESTS),
        25,
        needs=("build",),
        file=KERNEL_TESTS,
    ),
    Stage(
        "racecheck",
        _program("sanitize", "racecheck", KERNEL_TESTS),
        25,
        needs=("build",),
        file=KERNEL_TESTS,
    ),
)
assert sum(stage.seconds for stage in STAGES) <= BUDGET_S

FAULTS = ("failed", "overran", "no time", "interrupted")  # outcomes with which the check fails


# --- one stage -------------------------------------------------------------------------------------------------------


def _wait(pid: int, seconds: float) -> bool:
    """Whether the process has ended. It is not reaped: until then its id, and its group's, mean nobody else."""
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the stage and whatever it has left in its group; one that still runs first prints where it is."""
    if not _wait(process.pid, 0):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGABRT)  # PYTHONFAULTHANDLER: the stacks
        _wait(process.pid, GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Output:
    """What a stage has printed so far: its rows, and the end of everything else."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._read = 0
        self._unfinished = b""
        self.rows: list[dict[str, Any]] = []
        self.tail: list[str] = []

    def update(self, final: bool = False) -> bool:
        """Whether there was a new row."""
        file = self._file.fileno()
        more = os.pread(file, os.fstat(file).st_size - self._read, self._read)
        self._read += len(more)
        lines = (self._unfinished + more).split(b"\n")
        self._unfinished = b"" if final else lines.pop()
        known = len(self.rows)
        for line in (_without_paths(raw.decode(errors="replace")) for raw in lines):
            row = row_of(line)
            if row is not None:
                self.rows.append(row)
            elif line.strip():
                self.tail.append(line)
        self.tail = self.tail[-TAIL_LINES:]
        return len(self.rows) > known

    def as_json(self) -> dict[str, Any]:
        return {"rows": self.rows, "tail": "\n".join(self.tail)[-TAIL_CHARACTERS:]}


def _without_paths(line: str) -> str:
    """Where this machine keeps the tree and its environment is nobody's business."""
    line = line.replace(str(ROOT), ".")
    return line if sys.prefix == sys.base_prefix else line.replace(sys.prefix, "ENVIRONMENT")


def says(rows: list[dict[str, Any]]) -> str:
    """What a stage says of itself, last."""
    return next((row["says"] for row in reversed(rows) if "says" in row), "")


def execute(
    command: Sequence[str], limit_s: float, news: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Runs a stage's command; its outcome. ``news`` is called with what it has printed, whenever there is a new row."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as file:
        output = Output(file)
        try:
            process = _begin(command, limit_s, file)
        except OSError as error:
            return {"status": "failed", "why": f"cannot be started: {error.strerror}"}
        in_time = False
        try:
            while not in_time and (left_s := start + limit_s - time.monotonic()) > 0:
                in_time = _wait(process.pid, min(0.5, left_s))
                if output.update():
                    news(output.as_json())
        finally:
            _end(process)
            output.update(final=True)
            news(output.as_json())
    status, why = _judge(in_time, process.returncode, output, limit_s)
    seconds = round(time.monotonic() - start, 2)
    return {"status": status, "why": why, "exit": process.returncode, "seconds": seconds}


def _begin(command: Sequence[str], limit_s: float, output: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, LIMIT: f"{limit_s:.1f}"},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def _judge(in_time: bool, code: int, output: Output, limit_s: float) -> tuple[str, str]:
    last = output.tail[-1] if output.tail else "it printed nothing"
    if not in_time:
        return "overran", f"did not end within {limit_s:.0f} s"
    if code == 0:
        return "passed", ""
    if code == SKIPPED:
        return "skipped", says(output.rows) or last
    if code < 0:
        return "failed", f"ended by signal {-code}: {signal.strsignal(-code)}"
    return "failed", f"exit code {code}: {last}"


# --- all stages ------------------------------------------------------------------------------------------------------


def write(path: Path, result: Result) -> None:
    """Atomically: whoever reads, or kills us, finds one version or the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    unfinished.replace(path)


def limit_of(stage: Stage, later: Sequence[Stage], left_s: float) -> float:
    """Its own seconds and what those before it have left over; never what belongs to a later one, while time lasts."""
    return max(min(stage.seconds, left_s), left_s - sum(s.seconds for s in later))


def _obstacle(stage: Stage, outcomes: dict[str, str]) -> tuple[str, str] | None:
    """Status and reason, if the stage cannot even begin."""
    if stage.not_yet:
        return "not there yet", stage.not_yet
    if stage.file and not (ROOT / stage.file).exists():
        return "not there yet", f"no {stage.file}"
    for needed in stage.needs:
        if outcomes.get(needed, "passed") != "passed":
            return "skipped", f"needs {needed}: {outcomes[needed]}"
    return None


class Recorder:
    """The result, in memory and in its file."""

    def __init__(self, path: Path, stages: Sequence[Stage], about: dict[str, Any]) -> None:
        self._path = path
        self._start = time.monotonic()
        self.records = [{"stage": stage.name, "status": "waiting"} for stage in stages]
        self.result: Result = {
            "version": VERSION,
            **about,
            "finished": False,
            "stages": self.records,
        }

    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def note(self, index: int, news: dict[str, Any]) -> None:
        """Of the stage with this index."""
        self.records[index].update(news)
        self.result["seconds"] = round(self.elapsed_s(), 2)
        write(self._path, self.result)

    def finish(self) -> Result:
        self.result["finished"] = True
        write(self._path, self.result)
        return self.result


def run(
    stages: Sequence[Stage],
    out: Path,
    command_of: Callable[[Stage], list[str]],
    budget_s: float = BUDGET_S,
    about: dict[str, Any] | None = None,
) -> Result:
    """Runs the stages in order; the result, which is also in ``out``, at every moment."""
    recorder = Recorder(out, stages, about or {})
    for index, stage in enumerate(stages):
        left_s = budget_s - recorder.elapsed_s()
        outcomes = {record["stage"]: record["status"] for record in recorder.records[:index]}
        obstacle = _obstacle(stage, outcomes)
        if obstacle is None and left_s < LEAST_S:
            obstacle = "no time", f"all {budget_s:.0f} s were spent"
        if obstacle is not None:
            recorder.note(index, {"status": obstacle[0], "why": obstacle[1]})
        else:
            limit_s = limit_of(stage, stages[index + 1 :], left_s)
            _run_one(recorder, index, command_of(stage), limit_s)
        print(_line(recorder.records[index]), flush=True)
    return recorder.finish()


def _run_one(recorder: Recorder, index: int, command: list[str], limit_s: float) -> None:
    shown = " ".join(["python", *command[1:]])
    print(f"--- {shown} (at most {limit_s:.0f} s)", flush=True)
    begun = {"status": "running", "limit_s": round(limit_s, 1), "command": shown}
    recorder.note(index, begun)
    try:
        outcome = execute(command, limit_s, lambda news: recorder.note(index, news))
    except BaseException as error:
        recorder.note(index, {"status": "interrupted", "why": type(error).__name__})
        raise
    recorder.note(index, outcome)
    if outcome["status"] in FAULTS:
        print(recorder.records[index].get("tail", ""))


def _line(record: dict[str, Any]) -> str:
    """A row of the summary: the stage, its outcome, and what it says of itself or what kept it from running."""
    rows = record.get("rows", [])
    words = record.get("why") or says(rows) or (f"{len(rows)} rows" if rows else "")
    return (
        f"{record['stage']:27} {record['status']:14} {record.get('seconds', 0.0):6.1f} s  {words}"
    )


def faults(result: Result) -> list[str]:
    """Names of the stages with which the check fails."""
    return [record["stage"] for record in result["stages"] if record["status"] in FAULTS]


# --- the command -----------------------------------------------------------------------------------------------------


def digest_of_sources() -> str:
    """Tells trees apart where there is no git: of everything that is built, tested and measured."""
    digest = hashlib.sha256()
    for room in ("CMakeLists.txt", "pyproject.toml", "csrc", "pyallreduce", "tests", "benchmarks"):
        top = ROOT / room
        found = [top] if top.is_file() else sorted(top.rglob("*"))
        for path in found:
            if path.suffix in (".txt", ".toml", ".h", ".cc", ".cu", ".cuh", ".cpp", ".py", ".pyi"):
                digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        )
    except FileNotFoundError:
        return "unknown"
    return asked.stdout.strip() or "unknown"


def _terminated(signum: int, frame: object) -> None:
    sys.exit(128 + signum)  # the stage is ended and noted on the way out


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=WORK / "gpu-check.json")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument(
        "--installed", action="store_true", help="use the installed package: build nothing"
    )
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS")
    parser.add_argument("--only", nargs="+", choices=[s.name for s in STAGES], metavar="STAGE")
    given = parser.parse_args(arguments)

    signal.signal(signal.SIGTERM, _terminated)
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # a GPU process's core fills disks

    def command_of(stage: Stage) -> list[str]:
        built = WORK / "venv" / "bin" / "python"
        python = str(built) if "build" in stage.needs and not given.installed else sys.executable
        flags = stage.dry if given.dry_run else ()
        installed = ("--installed",) if stage.name == "build" and given.installed else ()
        return [python, *stage.arguments, *installed, *flags]

    about = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "dry_run": given.dry_run,
        "commit": commit(),
        "sources": digest_of_sources(),
        "budget_s": given.budget,
    }
    stages = [stage for stage in STAGES if not given.only or stage.name in given.only]
    result = run(stages, given.out, command_of, given.budget, about)
    print("\n" + "\n".join(map(_line, result["stages"])))
    bad = faults(result)
    print(f"wrote {given.out}: " + (f"FAILED: {', '.join(bad)}" if bad else "nothing failed"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
