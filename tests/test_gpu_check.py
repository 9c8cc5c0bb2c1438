"""`make gpu-check` loses nothing: not by a stage that hangs, crashes or is skipped, nor when it is killed itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks.gpu import (
    check,
    machine,
    ranks,
    ranks_on_one_gpu,
    report,
    roofline,
    sanitize,
    training,
    two_ranks,
)
from benchmarks.gpu.check import ROOT, Stage, limit_of
from benchmarks.gpu.program import row_of

ROW = 'import json, os; print(json.dumps({"pid": os.getpid()}), flush=True);'
HANG = ROW + "import time; time.sleep(600)"


def command_of(stage: Stage) -> list[str]:
    return ["/nothing"] if stage.arguments == ("nothing",) else [sys.executable, *stage.arguments]


def script(name: str, text: str, seconds: float = 20.0, **options: Any) -> Stage:
    return Stage(name, ("-c", text), seconds, **options)


def run(tmp_path: Path, *stages: Stage, budget_s: float = 60.0) -> list[dict[str, Any]]:
    """The stages' records, as the file has them."""
    out = tmp_path / "result.json"
    result = check.run(stages, out, command_of, budget_s)
    assert json.loads(out.read_text()) == result
    assert result["finished"]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    return result["stages"]


def has_ended(pid: int) -> bool:
    """Also by a parent that has not asked for it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- stages ----------------------------------------------------------------------------------------------------------


def test_a_stage_that_overruns_is_ended_with_its_children_and_keeps_its_rows(
    tmp_path: Path,
) -> None:
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]);"
    stage = Stage("slow", ("-c", child + HANG, HANG), 0.0)
    slow, after = run(tmp_path, stage, script("after", ROW, seconds=57.0), budget_s=60.0)
    assert slow["status"] == "overran"
    assert "within 3 s" in slow["why"]
    assert "Fatal Python error: Aborted" in slow["tail"]  # and where it was
    assert len(slow["rows"]) == 2
    for row in slow["rows"]:
        wait_until(lambda pid=row["pid"]: has_ended(pid))
    assert (after["status"], len(after["rows"])) == ("passed", 1)


def test_a_stage_that_crashes_keeps_its_rows_and_says_how(tmp_path: Path) -> None:
    text = ROW + "print('last words'); import sys; sys.exit(3)"
    left, killed = run(
        tmp_path, script("exits", text), script("aborts", ROW + "os.kill(os.getpid(), 9)")
    )
    assert (left["status"], left["why"]) == ("failed", "exit code 3: last words")
    assert (killed["status"], killed["why"]) == ("failed", "ended by signal 9: Killed")
    assert len(left["rows"]) == len(killed["rows"]) == 1


def test_what_cannot_run_says_why(tmp_path: Path) -> None:
    skipped = 'print(\'{"says": "no such tool"}\'); import sys; sys.exit(77)'
    records = run(
        tmp_path,
        script("fails", "raise SystemExit(1)"),
        script("behind it", ROW, needs=("fails",)),
        script("skips", skipped),
        script("has no file", ROW, file="benchmarks/gpu/nothing.py"),
        Stage("comes later", not_yet="no such code"),
        Stage("has no program", ("nothing",), 1.0),
        script("runs", ROW),
    )
    assert [(r["status"], r["why"]) for r in records] == [
        ("failed", "exit code 1: it printed nothing"),
        ("skipped", "needs fails: failed"),
        ("skipped", "no such tool"),
        ("not there yet", "no benchmarks/gpu/nothing.py"),
        ("not there yet", "no such code"),
        ("failed", "cannot be started: No such file or directory"),
        ("passed", ""),
    ]
    assert check.faults({"stages": records}) == ["fails", "has no program"]


def test_when_time_is_spent_the_rest_is_recorded_as_not_begun(tmp_path: Path) -> None:
    slow, late = run(tmp_path, script("slow", HANG, 2.0), script("late", ROW, 2.0), budget_s=2.0)
    assert slow["status"] == "overran"
    assert (late["status"], late["why"]) == ("no time", "all 2 s were spent")
    assert check.faults({"stages": [slow, late]}) == ["slow", "late"]


def test_a_stage_gets_what_others_leave_but_never_what_belongs_to_later_ones() -> None:
    first, second, third = (Stage(str(s), seconds=s) for s in (10.0, 20.0, 30.0))
    assert limit_of(first, [second, third], left_s=60.0) == 10.0
    assert limit_of(second, [third], left_s=58.0) == 28.0  # the first left 8
    assert limit_of(third, [], left_s=35.0) == 35.0
    assert limit_of(first, [second, third], left_s=40.0) == 10.0  # too little for all: in order
    assert limit_of(third, [], left_s=4.0) == 4.0


def test_output_is_split_into_rows_and_the_end_of_the_rest(tmp_path: Path) -> None:
    text = f"""
for i in range(200): print("line", i)
print('{{"a": NaN}}')
print('{{no row')
print("{ROOT}/x")
print('{{"b": 2}}', end="")
"""
    (record,) = run(tmp_path, script("talks", text))
    assert record["rows"] == [{"a": "NaN"}, {"b": 2}]
    tail = record["tail"].splitlines()
    assert tail[-3:] == ["line 199", "{no row", "./x"]
    assert len(tail) == check.TAIL_LINES
    assert row_of('["a"]') is None


# --- killed itself ---------------------------------------------------------------------------------------------------

DRIVER = """
import signal, sys
from pathlib import Path
from benchmarks.gpu import check
signal.signal(signal.SIGTERM, check._terminated)
stages = [check.Stage("one", ("-c", sys.argv[2]), 30.0), check.Stage("two", ("-c", sys.argv[3]), 30.0)]
check.run(stages, Path(sys.argv[1]), lambda s: [sys.executable, *s.arguments], 60.0, {"n": "x" * 200_000})
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_killed_in_the_middle_it_leaves_valid_json_with_all_that_was_found(
    tmp_path: Path, signum: int
) -> None:
    out = tmp_path / "result.json"
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(out), ROW, HANG], cwd=ROOT)
    pid = 0

    def second_has_a_row() -> bool:
        nonlocal pid
        if not out.exists():
            return False
        rows = json.loads(out.read_text())["stages"][1].get("rows")  # valid at every moment
        pid = rows[0]["pid"] if rows else 0
        return bool(rows)

    try:
        wait_until(second_has_a_row)
    finally:
        driver.send_signal(signum)
        code = driver.wait(30)
    result = json.loads(out.read_text())
    one, two = result["stages"]
    assert not result["finished"]
    assert (one["status"], len(one["rows"]), len(two["rows"])) == ("passed", 1, 1)
    ended_itself = signum == signal.SIGTERM
    assert code == (128 + signum if ended_itself else -signum)
    assert two["status"] == ("interrupted" if ended_itself else "running")
    wait_until(lambda: has_ended(pid))


# --- the real stages -------------------------------------------------------------------------------------------------


@pytest.mark.deadline(260)
def test_dry_run(tmp_path: Path) -> None:
    """As the command is used, on the installed package: small on the CPU, or words about what would run."""
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--dry-run", "--installed"]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    records = {record["stage"]: record for record in result["stages"]}
    assert list(records) == [stage.name for stage in check.STAGES]
    assert result["dry_run"]
    assert len(result["sources"]) == 16
    for name in ("machine", "build", "training", "ranks on one GPU", "two ranks train on one GPU"):
        assert records[name]["status"] == "passed", records[name]
    assert records["machine"]["rows"][0]["cores"] == len(os.sched_getaffinity(0))
    assert not records["build"]["rows"][0]["built"]
    (trained, _) = records["training"]["rows"]
    assert all(way["images_per_s"] > 0 for way in trained["ways"].values())
    assert set(trained["ways"]) == set(training.WAYS)
    tried = [row for row in records["ranks on one GPU"]["rows"] if "works" in row]
    assert [(row["way"], row["works"]) for row in tried] == [("gloo, through the host", True)]
    rows = [row for row in records["two ranks train on one GPU"]["rows"] if "mode" in row]
    assert [row["same_bits"] for row in rows] == [True] * len(two_ranks.MODES)
    for name, record in records.items():
        assert f"\n{name} " in done.stdout
        assert record["status"] == "passed" or record["why"], record
    assert str(ROOT) not in out.read_text()


def test_without_a_gpu_the_check_fails_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--only", "machine", "training"]
    done = subprocess.run(
        [*command, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "FAILED: machine" in done.stdout
    seen, trained = json.loads(out.read_text())["stages"]
    assert "torch sees no GPU" in seen["why"]
    assert trained["why"] == "needs machine: failed"


# --- programs --------------------------------------------------------------------------------------------------------

MARKED = """
import pytest

@pytest.mark.gpu
def test_needs_one(): pass

def test_needs_none(): pass
"""


@pytest.mark.parametrize(
    ("flags", "code", "outcomes"),
    [
        (["--gpu=skip"], 0, ["skipped", "passed"]),
        (["--gpu=require"], 1, ["failed", "passed"]),
        (["-k", "nothing"], 77, []),
    ],
)
def test_tests_marked_gpu_are_skipped_loudly_or_fail(
    tmp_path: Path, flags: list[str], code: int, outcomes: list[str]
) -> None:
    (tmp_path / "test_marked.py").write_text(MARKED)
    command = [sys.executable, *check.PYTEST, "-c", "pyproject.toml", "-p", "tests.conftest"]
    done = subprocess.run(
        [*command, *flags, str(tmp_path / "test_marked.py")],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    rows = [row for line in done.stdout.splitlines() if (row := row_of(line))]
    assert done.returncode == code, done.stdout + done.stderr
    assert [row["outcome"] for row in rows[:-1]] == outcomes
    assert all("torch sees no GPU" in row["why"] for row in rows[:1] if outcomes)
    assert rows[-1]["says"]


RAN, NONE_RAN = '{"tests": {"passed": 7, "failed": 1}}', '{"tests": {"failed": 8}}'


@pytest.mark.parametrize(
    ("planted", "ours", "code", "says"),
    [
        (("1 error", 86), (RAN, "0 errors", 1), 0, "in our kernels, 8 tests: 0 found (1 failed"),
        (("1 error", 86), (RAN, "2 errors", 86), 1, "in our kernels, 8 tests: 2 found"),
        (("1 error", 86), (NONE_RAN, "0 errors", 1), 1, "8 tests: 0 found (8 failed"),
        (("1 error", 86), (RAN, "", 139), 1, "8 tests: no summary"),
        (("0 errors", 0), None, 77, "memcheck does not find the planted fault here: exit code 0"),
        (("Device not supported", 1), None, 77, "exit code 1, ========= ERROR SUMMARY: Device"),
    ],
)
def test_a_sanitizer_counts_only_where_it_finds_a_planted_fault(
    tmp_path: Path, planted: tuple[str, int], ours: Any, code: int, says: str
) -> None:
    row, summary, exit_code = ours or ("", "must not be asked", 86)
    scripts = {
        "nvcc": "exit 0",
        "compute-sanitizer": f"""case "$*" in
            *pytest*) echo '{row}'; echo '========= ERROR SUMMARY: {summary}'; exit {exit_code} ;;
            esac; echo '========= ERROR SUMMARY: {planted[0]}'; exit {planted[1]}""",
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    command = [sys.executable, "-m", "benchmarks.gpu.sanitize", "memcheck", check.KERNEL_TESTS]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    rows = [row for line in done.stdout.splitlines() if (row := row_of(line))]
    assert done.returncode == code, done.stdout + done.stderr
    assert says in rows[-1]["says"]


def test_summaries_of_sanitizers_are_read() -> None:
    assert sanitize.count_of(["========= ERROR SUMMARY: 12 errors"]) == 12
    race = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
    assert sanitize.count_of(["=========", race]) == 1
    assert sanitize.count_of(["========= Error: Device not supported"]) is None


def test_planted_faults_compile(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    source = ROOT / "benchmarks" / "gpu" / "planted.cu"
    command = [nvcc, "-arch=sm_90", "-c", "-o", str(tmp_path / "planted.o"), str(source)]
    subprocess.run(command, check=True, timeout=60)


def test_wrong_sums_of_ranks_are_noticed() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for size, wrong in ((1, 0), (2, 1024)):  # one rank's data is not the sum of two
            for name in ("all_reduce", "reduce_scatter")[: 3 - size]:
                found, expected = ranks_on_one_gpu.operations(0, size, "cpu")[name](1024)
                assert int((found != expected).sum()) == wrong, name
    finally:
        dist.destroy_process_group()


def test_a_way_that_does_not_work_says_why() -> None:
    row = ranks_on_one_gpu.try_way(ranks.Way("none", "no-backend"), 2, "cpu")
    assert (row["works"], row["wrong"]) == (False, False)
    assert "no-backend" in row["why"]


def test_a_refusal_is_quoted_without_the_name_of_the_host() -> None:
    output = (
        "NCCL version 2.28.9\nnode7:12:34 [0] init.cc:9 NCCL WARN Duplicate GPU detected\nbye\n"
    )
    words = ranks.last_words(output)
    assert words == "[0] init.cc:9 NCCL WARN Duplicate GPU detected"
    assert ranks.last_words("one\n\ntwo\n") == "one\ntwo"


def test_cards_are_described_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ", ".join(f"value {i}" for i in range(len(machine.CARD)))
    monkeypatch.setattr(machine, "said", lambda *command: line)
    card = machine.card()
    assert card is not None
    assert card["name"] == "value 0"
    assert card.keys() == set(machine.CARD)


# --- table and picture -----------------------------------------------------------------------------------------------

ELEMENTS = 25_000_000
COPY_GB_S = 4000.0


def kernel_row(case: str, method: str, bytes_per_element: int, share: float) -> dict[str, Any]:
    moved = bytes_per_element * ELEMENTS
    return {
        "case": case,
        "method": method,
        "bytes": moved,
        "median_us": moved / (share * COPY_GB_S) / 1e3,
        "of_copy": share,
        "verified": share < 0.99 or case == "copy",
    }


def trained(batch: int) -> dict[str, Any]:
    way = {
        "images_per_s": 3000.0,
        "step_ms": 10.0,
        "update_ms": 0.125,
        "update_share": 0.0125,
        "host_ms": {"forward": 3.0, "backward": 4.0, "update": 0.5},
    }
    ways = {training.PLAIN: way, training.DDP: way}
    added = {training.DDP: {"step": 0.25, "host": 0.75}}
    return {"batch": batch, "ways": ways, "added_ms": added}


def made_up(**about: Any) -> dict[str, Any]:
    """A result as a GPU machine would leave it; no figure in it was measured."""
    seen = {
        "gpu": {"name": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132},
        "card": {"driver_version": "580.1", "clocks.max.sm": "1980 MHz"},
        **dict.fromkeys(("cuda", "torch", "nccl", "python"), "1.0"),
        "says": "NVIDIA H200",
    }
    kernels = [
        {"elements": ELEMENTS},
        kernel_row("copy", "ours, 2048 MiB", 8, 1.0),
        kernel_row("update", "ours", 20, 0.93),
        kernel_row("update", "torch fused", 20, 0.8),
        kernel_row("update", "torch foreach", 20, 0.41),
        kernel_row("scale, unpack, update, zero", "ours", 24, 0.9),
        kernel_row("scale, unpack, update, zero", "torch fused", 24, 0.5),
        kernel_row("update, bfloat16 gradients and copy", "ours", 20, 0.88),
        kernel_row("inspect", "ours", 4, 0.995),
        kernel_row("elementwise", "pack float32", 8, 0.9),
        kernel_row("elementwise", "sum of 4", 20, 0.85),
        kernel_row("sweep of the update", "1024 x 2", 20, 0.7),
        {"bar": "update / copy bandwidth", "value": 0.93, "at_least": 0.9, "met": True},
        {"bar": "update: torch fused / ours", "value": 0.97, "at_least": 1.0, "met": False},
    ]
    way = {"way": "nccl, a host id per rank", "ranks": 2, "works": True, "wrong": False}
    refused = {"way": "nccl, as it comes", "ranks": 2, "works": False, "wrong": False}
    ranks = [
        {**way, "all_reduce_ms": {"1024": 0.5, "25000000": 80.0}},
        {**refused, "why": "NCCL WARN Duplicate GPU | detected"},
        {"way": "gloo, through the host", "ranks": 4, "untried": "9 s are left"},
    ]
    tests = [
        {"test": "a", "outcome": "passed", "why": ""},
        {"test": "b", "outcome": "failed", "why": "bits"},
        {"tests": {"passed": 1, "failed": 1}, "says": "1 passed, 1 failed"},
    ]
    stages = [("machine", [seen]), ("kernels", kernels), ("training", [trained(32), trained(256)])]
    stages.append(("ranks on one GPU", ranks))
    eager = {"mode": "aggregator, eager", "error": 1e-4, "same_bits": True, "step_ms": 20.0}
    eager |= {"overlap_ratio": 0.75, "exposed_comm_s": 0.002, "comm_busy_s": 0.008}
    stages.append(("two ranks train on one GPU", [eager]))
    records: list[dict[str, Any]] = [
        {
            "stage": name,
            "status": "passed",
            "why": "",
            "seconds": 9.0,
            "rows": rows,
            "tail": "words",
        }
        for name, rows in stages
    ]
    failed = {"status": "failed", "why": "exit code 1: b", "seconds": 9.0, "tail": "why"}
    records.append({"stage": "kernel tests", "rows": tests, **failed})
    records.append({"stage": "two ranks", "status": "not there yet", "why": "no such code"})
    facts = {"started": "2026-01-01T00:00:00Z", "dry_run": False, "finished": True}
    facts |= {"commit": "unknown", "sources": check.digest_of_sources(), "seconds": 300.0}
    return {"version": check.VERSION, **facts, "stages": records, **about}


def test_what_a_run_found_becomes_a_line_a_table_and_a_picture(tmp_path: Path) -> None:
    file, results, docs = tmp_path / "found.json", tmp_path / "results", tmp_path / "docs"
    for seconds in (300.0, 301.0):  # the same run once more replaces its line
        file.write_text(json.dumps(made_up(seconds=seconds)))
        report.main([str(file), "--results", str(results), "--docs", str(docs)])
    (line,) = (results / "h200.jsonl").read_text().splitlines()
    kept = json.loads(line)
    assert kept["seconds"] == 301.0
    assert kept["commit"] == check.commit()  # of the tree whose sources these are
    by_name = {record["stage"]: record for record in kept["stages"]}
    assert "tail" not in by_name["machine"]
    assert by_name["kernel tests"]["tail"] == "why"
    assert [row.get("outcome") for row in by_name["kernel tests"]["rows"]] == ["failed", None]

    table = (results / "h200.md").read_text()
    for expected in (
        "| kernel tests | failed | 9 s | exit code 1: b |",
        "| two ranks | not there yet | 0 s | no such code |",
        "| update / copy bandwidth | >= 0.9 | 0.930 | yes |",
        "| update: torch fused / ours | >= 1 | 0.970 | no |",
        "| update: ours | 500.0 MB | 134 us | 3720 | 93.0% | right |",
        "| inspect: ours | 100.0 MB | 25.1 us | 3980 | 99.5% | WRONG |",
        f"| 256 | {training.DDP} | 3000 | 10.0 ms | 125 us | 1.25% | 7.00 ms |",
        f"| 32 | added by {training.DDP} (pairs of blocks) | - | +250 us | - | - | +750 us |",
        "| nccl, a host id per rank | 2 | right | 80.0 ms (25,000,000 elements) |",
        "| nccl, as it comes | 2 | NCCL WARN Duplicate GPU / detected | - |",
        "| gloo, through the host | 4 | not tried: 9 s are left | - |",
        "| aggregator, eager | 1.0e-04 | same bits | 20.0 ms | 75% | 2.00 ms | 8.00 ms |",
    ):
        assert expected in table
    assert "sweep" not in table
    assert (docs / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_a_dry_run_becomes_no_result(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text(json.dumps(made_up(dry_run=True)))
    assert report.main([str(file), "--results", str(tmp_path / "results")]) == 2
    assert not (tmp_path / "results").exists()


def test_points_lie_under_the_roof_that_was_measured() -> None:
    rows = next(r["rows"] for r in made_up()["stages"] if r["stage"] == "kernels")
    kernels = {kernel.name: kernel for kernel in roofline.kernels_of(rows)}
    assert roofline.copy_gb_s(list(kernels.values())) == pytest.approx(COPY_GB_S)
    update = kernels["update: ours"]
    assert update.flops is not None
    assert update.flops / update.moved_bytes == pytest.approx(8 / 20)
    assert update.gb_s == pytest.approx(0.93 * COPY_GB_S)
    assert kernels["pack float32"].flops == ELEMENTS
    assert kernels["copy: ours, 2048 MiB"].flops is None
    # 132 multiprocessors x 128 lanes x 2 x 1.98 GHz
    assert roofline.peak_gflops(made_up()["stages"][0]["rows"][0]) == pytest.approx(
        66_908, rel=1e-3
    )
    assert roofline.peak_gflops({"gpu": {"capability": "7.0", "multiprocessors": 80}}) is None


@pytest.mark.parametrize(("ddp", "agrees"), [(7.0, True), (7.1, True), (7.3, False)])
def test_ways_whose_losses_differ_are_noticed(ddp: float, agrees: bool) -> None:
    losses = {training.PLAIN: [7.0], training.DDP: [ddp]}
    row = {"losses": losses, "finite": {training.PLAIN: True, training.DDP: True}}
    assert training.agree(row) == agrees
    assert not training.agree({**row, "finite": {training.PLAIN: True, training.DDP: False}})


def test_what_ddp_adds_is_paired_by_block_so_that_drift_cancels() -> None:
    base = [[1.0, 1.0], [5.0, 5.0], [9.0, 9.0]]
    assert training.paired_ms([[x + 0.5 for x in block] for block in base], base) == 0.5
