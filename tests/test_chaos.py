"""A rank is struck at each moment of a collective's life: a pairwise sample of the chaos matrix, and the launchers.

The whole matrix, twice, with detection times: ``make chaos``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from chaos import kernel_view
from chaos.cases import DIMENSIONS, SENSELESS, Case, matrix, pairwise
from chaos.judge import Facts, complaints
from chaos.server import Server
from ranks import free_port_pair

# --- the matrix itself -----------------------------------------------------------------------------------------------


def test_the_matrix_has_each_value_and_leaves_out_only_what_a_rule_names() -> None:
    cases = list(matrix())
    assert len(set(cases)) == len(cases)
    for name, values in DIMENSIONS.items():
        assert {getattr(case, name) for case in cases} == set(values)
    assert all(len(reason) > 20 for reason, _ in SENSELESS)
    for case in cases:
        assert Case.named(str(case)) == case
        assert case.other != case.victim


def test_the_sample_has_every_pair_that_the_matrix_has() -> None:
    def pairs(cases: list[Case]) -> set[tuple[object, ...]]:
        return {
            (one, getattr(case, one), other, getattr(case, other))
            for case in cases
            for one in DIMENSIONS
            for other in DIMENSIONS
            if one < other
        }

    sample = pairwise()
    assert pairs(sample) == pairs(list(matrix()))
    assert len(sample) < 50
    faults = Counter(case.fault for case in sample)
    assert min(faults.values()) >= 3


# --- the sample ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if (reason := kernel_view.why_blind()) is not None:
        pytest.skip(reason)
    with Server(free_port_pair()) as running:
        yield running


@pytest.mark.parametrize("case", pairwise(), ids=str)
def test_a_fault(server: Server, case: Case) -> None:
    facts = server.run(case)
    found = complaints(case, facts)
    assert not found, "\n".join([*found, *facts["stderr"]])


def edited(facts: Facts, *path: str | int, value: object) -> Facts:
    copy = deepcopy(facts)
    place: Any = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copy


def test_the_judge_notices(server: Server) -> None:
    case = Case("kill", "in_reduction", 2, "step", 0)
    victim, survivor = case.victim, 1 - case.victim
    facts = server.run(case)
    assert not complaints(case, facts)
    error, record = ("records", survivor, "error"), ("records", survivor)
    more = {
        name: count + 1 for name, count in facts["records"][survivor]["holdings_before"].items()
    }
    for path, value, words in (
        (("is_reached",), False, "moment"),
        (("late",), [survivor], "did not end"),
        (("left",), ["process 7"], "process 7"),
        (("exit_codes", survivor), -11, "exit code -11"),
        (("exit_codes", victim), 0, "exit code 0"),
        (("ended_s", victim), facts["struck_s"] + 60, "ended 60"),
        (("struck_s",), facts["struck_s"] - 2, "after the fault"),
        (("stderr", survivor), "Traceback (most recent call last)", "traceback"),
        (("stderr", victim), "terminate called", "crashed"),
        (record, None, "no record"),
        (error, None, "no error"),
        ((*error, "type"), "TimeoutError", "instead of PeerError"),
        ((*error, "peers"), [survivor], "names"),
        ((*record, "again"), None, "succeeded"),
        ((*record, "again", "message"), "another", "first cause"),
        ((*record, "again", "called_s"), 0.0, "took"),
        ((*record, "weights"), "mixed", "mixed"),
        ((*record, "strange"), True, "neither"),
        ((*record, "close_s"), 60.0, "close()"),
        ((*record, "holdings_after"), more, "threads"),
        ((*record, "holdings_after"), more, "descriptors"),
        ((*record, "holdings_after"), more, "mappings"),
    ):
        found = complaints(case, edited(facts, *path, value=value))
        assert any(words in text for text in found), (path, value, found)


# --- under the launchers ---------------------------------------------------------------------------------------------

DIES = """
import os, signal, sys, torch, pyallreduce as par
comm = par.init()
t = torch.ones(1 << 20)
for i in range(1000):
    if comm.rank == 1 and i == 5:
        open(sys.argv[1], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    comm.all_reduce(t)
"""
# From a rank's death to the end of the launcher. torchrun gives 30 s to ranks that do not end at SIGTERM.
LAUNCHER_S = 20.0


def left_of(mark: str) -> list[int]:
    """Processes that have this in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if mark.encode() in environment and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def run_and_die(script: Path, *launcher: str) -> tuple[subprocess.CompletedProcess[str], list[int]]:
    """How the launcher ended, and which processes it has left two seconds later."""
    script.write_text(DIES)
    died = script.with_suffix(".died")
    mark = f"CHAOS_MARK={uuid.uuid4()}"
    name, value = mark.split("=")
    shared = set(os.listdir("/dev/shm"))
    result = subprocess.run(
        [*launcher, str(script), str(died)],
        env={**os.environ, name: value},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert time.time() - died.stat().st_mtime < LAUNCHER_S
    give_up_at = time.monotonic() + 2
    while (left := left_of(mark)) and time.monotonic() < give_up_at:
        time.sleep(0.02)
    named = [entry for entry in set(os.listdir("/dev/shm")) - shared if "pyallreduce" in entry]
    assert not named
    return result, left


def test_torchrun_ends_when_a_rank_is_killed(tmp_path: Path) -> None:
    result, left = run_and_die(
        tmp_path / "dies.py",
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=3",
    )
    assert result.returncode != 0
    assert "SIGKILL" in result.stderr
    assert not left


def test_mpirun_ends_when_a_rank_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    mpiexec = Path(sys.executable).parent / "mpiexec"
    if not mpiexec.exists():
        pytest.skip("no mpiexec beside python: pip install mpich")
    result, left = run_and_die(tmp_path / "dies.py", str(mpiexec), "-n", "3", sys.executable)
    assert result.returncode != 0
    assert not left
