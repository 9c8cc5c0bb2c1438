"""The command line: `bench` measures and counts what it says, `trace` draws what was recorded."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyallreduce import launch, trace
from pyallreduce.__main__ import main, parser
from pyallreduce.cli import bench, local_ranks
from pyallreduce.cli.backends import make_backend
from pyallreduce.cli.measure import Bench, Result, combine, count_wrong, pattern
from pyallreduce.cli.table import fixed
from pyallreduce.communicator import Communicator
from pyallreduce.errors import UsageError
from pyallreduce.report import BucketTimes, Iteration
from ranks import run_ranks

PYALLREDUCE = [sys.executable, "-m", "pyallreduce"]
PLAIN_ENV = {k: v for k, v in os.environ.items() if not k.startswith("PYALLREDUCE_")}


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a usage error."""
    try:
        code: object = main(argv)
    except SystemExit as error:  # argparse's own
        code = error.code
    assert code == 2
    message = capsys.readouterr().err
    assert message
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("command", ["plan"])
def test_planned_commands_say_so(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "planned" in refused(capsys, command)


# --- bench -----------------------------------------------------------------------------------------------------------

HALF = ["time", "algbw", "busbw", "#wrong"]
SPREAD = ["i_min", "i_max", "i_p99", "i_cv%"]
LEFT = ["size", "count", "type", "redop", "root"]


def benched(rank: int, n: int, *argv: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `pyallreduce bench` on one rank."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = main(["bench", *argv])
    return code, out.getvalue(), err.getvalue()


def table_of(out: str) -> list[dict[str, str]]:
    """The rows by column; in-place columns have a second name with a ``+``."""
    lines = out.splitlines()
    titles = next(line for line in lines if re.match(r"#\s+size ", line))[1:].split()
    half = HALF + SPREAD if "i_min" in titles else HALF
    assert titles == LEFT + half * 2
    names = LEFT + half + [f"{name}+" for name in half]
    rows = [line.split() for line in lines if not line.startswith("#")]
    assert all(len(row) == len(names) for row in rows)
    return [dict(zip(names, row, strict=True)) for row in rows]


def values_of(out: str, *columns: str) -> list[tuple[str, ...]]:
    return [tuple(row[column] for column in columns) for row in table_of(out)]


@pytest.mark.parametrize(
    ("collective", "shards", "factor"),
    [("all_reduce", 1, 4 / 3), ("reduce_scatter", 3, 2 / 3), ("all_gather", 3, 2 / 3), ("broadcast", 1, 1)],
)  # fmt: skip
def test_every_collective_type_and_op(collective: str, shards: int, factor: float) -> None:
    argv = (
        collective,
        "-b",
        "40K",
        "-e",
        "100K",
        "-i",
        "60K",
        "-d",
        "all",
        "-o",
        "all",
        "-r",
        "all",
        "-n",
        "2",
    )
    results = run_ranks(3, benched, *argv)  # fmt: skip
    assert [code for code, _, _ in results] == [0, 0, 0], results
    assert [out for _, out, _ in results[1:]] == ["", ""]  # only rank 0 speaks
    out = results[0][1]
    rows = table_of(out)
    reduces = collective in ("all_reduce", "reduce_scatter")
    combinations = {
        (name, op)
        for name in bench.DATATYPES
        for op in (bench.OPS if reduces else ["none"])
        if not (op == "avg" and name in bench.INTEGERS)
    }
    roots = ["0", "1", "2"] if collective == "broadcast" else ["-1"]
    assert len(rows) == 2 * len(combinations) * len(roots)
    assert {(row["type"], row["redop"]) for row in rows} == combinations
    assert sorted({row["root"] for row in rows}) == roots
    for row in rows:
        itemsize = getattr(torch, bench.DATATYPES[row["type"]]).itemsize
        asked = 40 << 10 if int(row["size"]) <= 40 << 10 else 100 << 10
        assert int(row["count"]) == asked // itemsize // shards
        assert int(row["size"]) == int(row["count"]) * itemsize * shards
        for place in ("", "+"):
            assert row["#wrong" + place] == "0"
            algbw = int(row["size"]) / float(row["time" + place]) / 1e3
            assert float(row["algbw" + place]) == pytest.approx(algbw, rel=0.01, abs=0.006)
            assert float(row["busbw" + place]) == pytest.approx(algbw * factor, rel=0.01, abs=0.006)
    assert "# Out of bounds values : 0 OK\n" in out
    assert f"# Collective test concluded: {collective}\n" in out
    mean = sum(float(row["busbw"]) + float(row["busbw+"]) for row in rows) / len(rows) / 2
    found = re.search(r"^# Avg bus bandwidth    : (\S+)$", out, re.MULTILINE)
    assert found is not None
    assert float(found[1]) == pytest.approx(mean, abs=0.01)


def benched_with_a_flaw(rank: int, n: int, *argv: str) -> tuple[int, str, str]:
    """Rank 1 gets one wrong element in every all-reduce of a plain tensor."""
    right = Communicator.all_reduce

    def wrong(self: Communicator, tensor: torch.Tensor, *rest: Any) -> Any:
        result = right(self, tensor, *rest)
        if rank == 1 and tensor.untyped_storage().nbytes() == 4096 and not is_symmetric(tensor):
            tensor[-1] += 1
        return result

    def is_symmetric(tensor: torch.Tensor) -> bool:
        return any(tensor.data_ptr() == address for address in symmetric)

    symmetric: list[int] = []
    make = Communicator.symmetric_empty

    def remember(self: Communicator, *rest: Any) -> torch.Tensor:
        tensor = make(self, *rest)
        symmetric.append(tensor.data_ptr())
        return tensor

    Communicator.all_reduce, Communicator.symmetric_empty = wrong, remember  # type: ignore[method-assign]
    return benched(rank, n, *argv)


def test_wrong_data_are_counted_and_fail() -> None:
    argv = ("-b", "4K", "-e", "4K", "-c", "3", "-o", "max", "-a", "3")
    results = run_ranks(2, benched_with_a_flaw, *argv)
    assert [code for code, _, _ in results] == [1, 1]
    assert values_of(results[0][1], "#wrong", "#wrong+") == [("3", "0")]
    assert "# Out of bounds values : 3 FAILED\n" in results[0][1]


def test_no_check_is_not_a_passed_check() -> None:
    results = run_ranks(2, benched_with_a_flaw, "-b", "4K", "-e", "4K", "-c", "0")
    assert results[0][0] == 0
    assert values_of(results[0][1], "#wrong", "#wrong+") == [("N/A", "N/A")]


def test_per_iteration_times_and_json(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    argv = ("all_gather", "-b", "1K", "-e", "16K", "-f", "4", "-n", "30", "-I", "-J", str(path))
    (code, out, _), _ = run_ranks(2, benched, *argv)
    assert code == 0
    document = json.loads(path.read_text())
    assert document["version"] == 1
    assert document["config"]["nranks"] == 2
    assert document["config"]["iterations"] == 30
    assert [rank["rank"] for rank in document["config"]["ranks"]] == [0, 1]
    assert document["out_of_bounds"] == {"count": 0, "okay": True}
    rows = table_of(out)
    assert [row["size"] for row in document["results"]] == [1024, 4096, 16384]
    for row, found in zip(rows, document["results"], strict=True):
        assert [str(found[name]) for name in LEFT] == [row[name] for name in LEFT]
        for place, name in (("", "out_of_place"), ("+", "in_place")):
            half, spread = found[name], found[f"{name}_per_iter"]
            assert row["time" + place] == fixed(half["time"], 7)
            assert half["alg_bw"] == pytest.approx(found["size"] / half["time"] / 1e3)
            assert half["bus_bw"] == pytest.approx(half["alg_bw"] / 2)
            assert len(spread["times_us"]) == 30
            assert spread["min_us"] == min(spread["times_us"])
            assert spread["max_us"] == max(spread["times_us"])
            cells = [fixed(spread[key], 7) for key in ("min_us", "max_us", "p99_us", "cv_pct")]
            assert cells == [row[column + place] for column in SPREAD]


def test_spread() -> None:
    calls_s = [float(1 + (7 * i) % 200) for i in range(200)]  # 1 to 200, in some order
    spread = Result(1.0, 1.0, 1.0, 0, calls_s).spread()
    assert spread["min_us"] == pytest.approx(1e6)
    assert spread["max_us"] == pytest.approx(200e6)
    assert spread["p99_us"] == pytest.approx(198e6)  # 198 of 200 calls take no longer
    assert spread["cv_pct"] == pytest.approx(100 * ((200**2 - 1) / 12) ** 0.5 / 100.5)


def paced(rank: int, n: int) -> tuple[float, list[float]]:
    """Time and samples of four calls; rank 0 takes 20 ms for the first, rank 1 for the third."""
    backend = make_backend("pyallreduce", launch.Launch("torchrun", rank, n), 30)
    options = parser().parse_args(
        ["bench", "broadcast", "-b", "8", "-e", "8", "-w", "0", "-n", "4", "-a", "2", "-I"]
    )
    pace = iter([0.02, 0.0, 0.0, 0.0] if rank == 0 else [0.0, 0.0, 0.02, 0.0])
    backend.broadcast = lambda data, root: time.sleep(next(pace, 0.0))  # type: ignore[method-assign]
    result = Bench(options, backend).result(bench.Case("float", "none", 0), 2, symmetric=True)
    return result.time_s, result.samples_s


def test_a_call_is_as_slow_as_its_slowest_rank() -> None:
    (time_s, samples_s), other = run_ranks(2, paced)
    assert (time_s, samples_s) == other
    assert 0.005 <= time_s < 0.02
    assert [sample_s >= 0.02 for sample_s in samples_s] == [True, False, True, False]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("op", bench.OPS)
def test_the_data_notice_what_goes_wrong(op: str, size: int) -> None:
    """Exact in bfloat16 however it is summed; another shard, a missing rank or an old result are seen."""
    inputs = [pattern(torch.arange(1000), rank, 1, op, size) for rank in range(size)]
    want = combine([data.double() for data in inputs], op)
    summed = combine([data.bfloat16() for data in inputs], op)
    got = summed / size if op == "avg" else summed
    assert count_wrong(got, want, op, size) == 0
    assert count_wrong(got.roll(256), want, op, size) > 100
    older_inputs = [pattern(torch.arange(1000), rank, 0, op, size) for rank in range(size)]
    older = combine([data.double() for data in older_inputs], op)
    assert count_wrong(got, older, op, size) > 100
    if size > 1 and (size < 100 or op not in ("max", "min")):
        without_last = combine([data.double() for data in inputs[:-1]], op)
        assert count_wrong(got, without_last, op, size) > 50
    nan = torch.full_like(got, float("nan"))
    assert count_wrong(nan, want, op, size) == 1000


def test_gloo_in_the_same_format() -> None:
    (code, out, err), other = run_ranks(
        2, benched, "--backend", "gloo", "-b", "4K", "-e", "16K", "-f", "4", "-o", "all", "-d", "half"
    )  # fmt: skip
    assert (code, other[0]) == (0, 0), err
    rows = table_of(out)
    assert [row["size"] for row in rows] == ["4096", "16384"] * 5
    assert {row["#wrong"] for row in rows} == {"0"}
    assert {row[name + "+"] for row in rows for name in HALF} == {"-"}


def test_one_rank_has_no_bus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        Communicator, "broadcast", lambda self, *rest: None
    )  # in place: nothing to do
    assert main(["bench", "broadcast", "--nproc", "1", "-b", "1K", "-e", "1K"]) == 0
    out = capsys.readouterr().out
    assert values_of(out, "busbw", "#wrong", "busbw+") == [("-", "0", "-")]
    assert "# Avg bus bandwidth    : -\n" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["all_to_all"], ["all_to_all", "all_reduce"]),
        (["-b", "1K", "-e", "1"], ["-b 1024", "-e 1"]),
        (["-b", "many"], ["-b", "many"]),
        (["-b", "-1"], ["-b"]),
        (["-f", "1"], ["-f"]),
        (["-b", "0", "-f", "2"], ["-f", "-b"]),
        (["-i", "0"], ["-i 0"]),
        (["-i", "1K", "-f", "2"], ["-i", "-f"]),
        (["-d", "float8"], ["-d", "float8"]),
        (["-d", "int32", "-o", "avg"], ["avg", "int32"]),
        (["-n", "0"], ["-n"]),
        (["-c", "-1"], ["-c"]),
        (["-a", "4"], ["-a", "4"]),
        (["-T", "0"], ["-T"]),
        (["-J", "no/such/folder/x.json"], ["no/such/folder"]),
        (["broadcast", "-r", "1", "--nproc", "1"], ["-r 1", "0"]),
    ],
)
def test_bench_refuses(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "bench", *argv)
    assert all(word in message for word in words), message


def test_bench_refuses_by_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYALLREDUCE_TRACES", "x")
    assert "PYALLREDUCE_TRACE" in refused(capsys, "bench")
    monkeypatch.delenv("PYALLREDUCE_TRACES")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "leave out --nproc" in refused(capsys, "bench", "--nproc", "2")


def test_sizes_and_names() -> None:
    assert [bench.number_of_bytes(text) for text in ("7", "1K", "1.5m", "2G")] == [
        7,
        1024,
        3 << 19,
        2 << 30,
    ]
    assert bench.datatype("float16") == bench.datatype("half") == "half"
    assert [fixed(value, 6) for value in (0.0, 1.234, 123.456, 1234.56, 123456.7, 1234567.8)] == [
        "0.00", "1.23", "123.46", "1234.6", "123457", "1.2e+06",
    ]  # fmt: skip
    assert bench.without_nproc(["bench", "-n", "3", "--nproc", "4", "-I"]) == [
        "bench",
        "-n",
        "3",
        "-I",
    ]


def test_bench_starts_its_own_ranks() -> None:
    command = [*PYALLREDUCE, "bench", "-b", "1K", "-e", "64K", "-f", "8", "--nproc", "2"]
    result = subprocess.run(command, env=PLAIN_ENV, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert values_of(result.stdout, "size", "#wrong", "#wrong+") == [
        (str(size), "0", "0") for size in (1 << 10, 1 << 13, 1 << 16)
    ]


def test_bench_under_mpirun_with_gloo() -> None:
    """gloo meets where this library meets, so every launcher will do."""
    mpiexec = Path(sys.executable).parent / "mpiexec"
    if not mpiexec.exists():
        pytest.skip("no mpiexec beside python: pip install mpich")
    pytest.importorskip("mpi4py", reason="the rendezvous under mpirun needs mpi4py")
    command = [
        str(mpiexec),
        "-n",
        "2",
        *PYALLREDUCE,
        "bench",
        "--backend",
        "gloo",
        "-b",
        "1K",
        "-e",
        "1K",
    ]
    result = subprocess.run(command, env=PLAIN_ENV, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert values_of(result.stdout, "size", "#wrong") == [("1024", "0")]


def test_a_killed_rank_ends_the_others() -> None:
    command = [*PYALLREDUCE, "bench", "-b", "1K", "-e", "1K", "-n", "100000000"]
    parent = subprocess.Popen(
        command, env=PLAIN_ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        pids: list[int] = []
        for line in parent.stdout:
            if found := re.match(r"#  Rank +\d+ Pid +(\d+)", line):
                pids.append(int(found[1]))
            if len(pids) == 2:
                break
        time.sleep(0.2)
        os.kill(pids[1], signal.SIGKILL)
        _, err = parent.communicate(timeout=30)
    finally:
        parent.kill()
        parent.wait()
    assert parent.returncode == 1
    assert "rank 0: PeerError" in err
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_the_exit_code_of_ranks() -> None:
    def code(script: str) -> int:
        return local_ranks.run_local_ranks([sys.executable, "-S", "-c", script], 3)

    assert code("pass") == 0
    assert code("import os; raise SystemExit(2 * (os.environ['RANK'] == '1'))") == 2
    assert code("import os; os.abort()") == 1
    begin = time.monotonic()  # one that hangs does not outlive the others for long
    assert code("import os, time; time.sleep(60 * (os.environ['RANK'] == '2')) or exit(1)") == 1
    assert time.monotonic() - begin < local_ranks.GRACE_S + 10


# --- trace: the files ------------------------------------------------------------------------------------------------


def iteration(number: int, start_s: float, late_rank: int = 1, size: int = 2) -> Iteration:
    """Ten seconds: forward 2, backward 3, wait 3, update 1; two buckets."""
    phases = [
        ("forward", start_s, start_s + 2),
        ("backward", start_s + 2, start_s + 5),
        ("wait", start_s + 5, start_s + 8),
        ("update", start_s + 9, start_s + 10),
    ]
    arrivals_s = [start_s + (4.5 if rank == late_rank else 4) for rank in range(size)]
    first = BucketTimes(
        0, 1 << 20, ["b", "w"], start_s + 3, start_s + 3.5, start_s + 4, start_s + 6, start_s + 5, arrivals_s
    )  # fmt: skip
    second = BucketTimes(
        1, 2048, ["e"], start_s + 5, start_s + 5, start_s + 6, start_s + 8, start_s + 5, [start_s + 6] * size
    )  # fmt: skip
    return Iteration(number, start_s, start_s + 10, phases, [first, second])


Writer = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Writer:
    """Writes a rank's file as an aggregator would."""

    def write(
        rank: int,
        size: int = 2,
        starts_s: tuple[float, ...] = (100.0, 120.0),
        folder: str = "trace",
        **header: Any,
    ) -> Path:
        monkeypatch.setenv("PYALLREDUCE_TRACE", str(tmp_path / folder))
        monkeypatch.setattr(trace, "_files", {})
        writer = trace.open_trace(rank, size)
        assert writer is not None
        for number, start_s in enumerate(starts_s, start=1):
            writer.add(iteration(number, start_s, size=size))
        writer.flush()
        path = tmp_path / folder / f"rank{rank}.jsonl"
        if header:
            first, _, rest = path.read_text().partition("\n")
            path.write_text(json.dumps({**json.loads(first), **header}) + "\n" + rest)
        return path

    return write


def test_no_variable_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYALLREDUCE_TRACE", raising=False)
    assert trace.open_trace(0, 1) is None


def test_what_is_written_is_read(written: Writer) -> None:
    found = trace.read_rank(written(1))
    assert found is not None
    assert (found.rank, found.size, found.pid, found.truncated) == (1, 2, os.getpid(), False)
    assert found.iterations == {0: [iteration(1, 100.0), iteration(2, 120.0)]}
    assert found.wall_minus_monotonic_s + time.monotonic() == pytest.approx(time.time(), abs=1)


def test_lines_wait_for_a_second_and_no_longer(
    written: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(0, starts_s=())
    writer = trace.TraceWriter(trace._files[str(path)], 0, 2)  # a second aggregator of the process
    header = path.read_text()
    assert header.count("\n") == 2
    monkeypatch.setattr(trace, "FLUSH_EVERY_S", 1e9)
    writer.add(iteration(1, 100.0))
    assert path.read_text() == header
    monkeypatch.setattr(trace, "FLUSH_EVERY_S", 0.0)
    writer.add(iteration(2, 110.0))
    found = trace.read_rank(path)
    assert found is not None
    assert found.iterations == {0: [], 1: [iteration(1, 100.0), iteration(2, 110.0)]}


def test_the_end_of_a_process_writes_the_rest_once(tmp_path: Path) -> None:
    """A forked child has a copy of the lines, and must not write them too."""
    script = """
import os, sys
sys.path.insert(0, "tests")
from pyallreduce import trace
from pyallreduce.report import Iteration
trace.FLUSH_EVERY_S = 1e9
writer = trace.open_trace(0, 1)
writer.add(Iteration(1, 1.0, 2.0, [], []))
if os.fork() == 0:
    writer.flush()
    sys.exit()
os.wait()
"""
    env = {**PLAIN_ENV, "PYALLREDUCE_TRACE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=env, check=True, timeout=60)
    assert len((tmp_path / "rank0.jsonl").read_text().splitlines()) == 2


def test_a_full_disk_does_not_end_the_training(tmp_path: Path) -> None:
    script = """
import resource
from pyallreduce import trace
from pyallreduce.report import Iteration
trace.FLUSH_EVERY_S = 0.0
writer = trace.open_trace(0, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for number in range(100):
    writer.add(Iteration(number, 1.0, 2.0, [], []))
print("trained")
"""
    env = {**PLAIN_ENV, "PYALLREDUCE_TRACE": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (0, "trained\n")
    assert result.stderr.count("RuntimeWarning: the trace ends here") == 1
    found = trace.read_rank(tmp_path / "rank0.jsonl")
    assert found is not None
    assert found.truncated
    assert len(found.iterations[0]) > 5


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYALLREDUCE_TRACE", str(tmp_path / "file" / "trace"))
    with pytest.raises(UsageError, match="PYALLREDUCE_TRACE: cannot write"):
        trace.open_trace(0, 1)


# --- trace: the timeline ---------------------------------------------------------------------------------------------


def merged(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    document: dict[str, Any] = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    return document


def slices(document: dict[str, Any], rank: int, lane: str) -> list[tuple[str, float, float]]:
    """Name, start and duration of a lane's slices."""
    events = [event for event in document["traceEvents"] if event["pid"] == rank]
    (tid,) = [
        event["tid"]
        for event in events
        if event["name"] == "thread_name" and event["args"]["name"] == lane
    ]
    return [(e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == tid]


def test_the_timeline_by_hand(written: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(0).parent
    written(1)
    assert main(["trace", str(folder)]) == 0
    document = merged(folder / "trace.json")
    second = 1e6
    assert slices(document, 0, "compute")[5:] == [
        ("iteration 2", 20 * second, 10 * second),
        ("forward", 20 * second, 2 * second),
        ("backward", 22 * second, 3 * second),
        ("wait", 25 * second, 3 * second),
        ("update", 29 * second, 1 * second),
    ]
    assert slices(document, 0, "bucket 0 (1.0 MiB)")[:3] == [
        ("queue bucket 0", 3 * second, 1 * second),
        ("transfer bucket 0", 4 * second, 2 * second),
        ("waits for rank 1", 4 * second, 0.5 * second),
    ]
    assert len(slices(document, 1, "bucket 0 (1.0 MiB)")) == 4  # rank 1 waits for nobody
    assert slices(document, 1, "bucket 1 (2.0 KiB)")[2:] == [
        ("queue bucket 1", 25 * second, 1 * second),
        ("transfer bucket 1", 26 * second, 2 * second),
    ]
    assert slices(document, 1, "exposed communication") == [
        ("exposed", 5 * second, 3 * second),
        ("exposed", 25 * second, 3 * second),
    ]
    assert document["distributedInfo"]["world_size"] == 2
    assert document["distributedInfo"]["backend"] == "pyallreduce"
    assert "CLOCK_MONOTONIC" in document["otherData"]["clock"]
    by_kind = {
        kind: [event for event in document["traceEvents"] if event["ph"] == kind]
        for kind in "MXstf"
    }
    assert sum(map(len, by_kind.values())) == len(document["traceEvents"])
    order = {(e["pid"], e["tid"]) for e in by_kind["M"] if e["name"] == "thread_sort_index"}
    assert order == {(e["pid"], e["tid"]) for e in by_kind["X"]}
    names = [e["args"]["name"] for e in by_kind["M"] if e["name"] == "process_name"]
    assert [name.split(" (")[0] for name in names] == ["rank 0 of 2", "rank 1 of 2"]
    transfers = [e["args"] for e in by_kind["X"] if e["cat"] == "transfer" and e["pid"] == 0]
    assert transfers[0] == {"bytes": 1 << 20, "params": ["b", "w"]}
    assert transfers[2] == {"bytes": 1 << 20}
    # Arrows: from backward, at ready, to the transfer, to the training thread when it is there and wanted.
    assert [e["id"] for e in by_kind["s"]] == list(range(8))
    for kind, at in (("s", 3), ("t", 4), ("f", 6)):
        event = by_kind[kind][0]
        assert (event["id"], event["ts"], event["name"]) == (0, at * second, "bucket 0")
    assert by_kind["s"][0]["tid"] == by_kind["f"][0]["tid"] != by_kind["t"][0]["tid"]


def test_the_summary_by_hand(written: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(0).parent
    written(1)
    assert main(["trace", str(folder), "-o", str(folder / "out.json.gz")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0].startswith("2 of 2 rank(s), 1 host(s)")
    assert lines[1].split() == [
        "rank", "iterations", "window_ms", "compute_ms", "exposed_ms", "overlap", "skew_ms",
    ]  # fmt: skip
    assert lines[2].split() == ["0", "2", "10000.000", "6000.000", "3000.000", "0.25", "500.000"]
    assert lines[3].split() == ["1", "2", "10000.000", "6000.000", "3000.000", "0.25", "0.000"]
    assert lines[4] == (
        "slowest rank: 1, the last in 2 of 2 iterations; others wait up to 500.000 ms for it"
    )
    assert "out.json.gz" in lines[5]
    assert merged(folder / "out.json.gz")["traceEvents"]


def test_ranks_of_two_hosts_meet_by_their_wall_clocks(written: Writer) -> None:
    """Host b booted 1000 s after host a, so the same moment is 1000 s less on its clock."""
    folder = written(0, host="a", clock="a", wall_s=5000.0, monotonic_s=2000.0).parent
    written(1, starts_s=(-899.5, -879.5), host="b", clock="b", wall_s=5000.0, monotonic_s=1000.0)
    assert main(["trace", str(folder)]) == 0
    document = merged(folder / "trace.json")
    assert slices(document, 0, "compute")[0][1] == 0
    assert slices(document, 1, "compute")[0][1] == 0.5e6
    assert "rank(s) 1 was shifted" in document["otherData"]["clock"]
    assert "wall clocks" in document["otherData"]["clock"]


def test_slices_of_a_lane_nest(written: Writer) -> None:
    """Odd times too: a viewer drops slices that overlap without containing each other."""
    folder = written(0, starts_s=(1.23456789, 11.2345679123)).parent
    written(1, starts_s=(1.23456789, 11.2345679123))
    assert main(["trace", str(folder)]) == 0
    open_until: dict[tuple[int, int], list[float]] = {}
    for event in merged(folder / "trace.json")["traceEvents"]:
        if event["ph"] != "X":
            continue
        ends = open_until.setdefault((event["pid"], event["tid"]), [])
        begin, end = event["ts"], round(event["ts"] + event["dur"], 3)
        while ends and ends[-1] <= begin:
            ends.pop()
        assert not ends or end <= ends[-1], event
        ends.append(end)
    assert len(open_until) == 8


def test_two_aggregators_have_lanes_of_their_own(written: Writer) -> None:
    path = written(0, size=1)
    writer = trace.TraceWriter(trace._files[str(path)], 0, 1)
    writer.add(iteration(1, 130.0, size=1))
    writer.flush()
    assert main(["trace", str(path.parent)]) == 0
    document = merged(path.parent / "trace.json")
    assert len(slices(document, 0, "aggregator 0: compute")) == 10
    assert slices(document, 0, "aggregator 1: compute")[0] == ("iteration 1", 30e6, 10e6)


# --- trace: what is missing or broken --------------------------------------------------------------------------------


def test_a_killed_rank_leaves_a_readable_file(
    written: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(0, size=4)
    text = path.read_text()
    path.write_text(text[: len(text) - 20])  # in the middle of the last line
    written(2, size=4)
    (path.parent / "rank3.jsonl").write_text("")
    assert main(["trace", str(path.parent)]) == 0
    captured = capsys.readouterr()
    assert "rank0.jsonl: the last line is incomplete" in captured.err
    assert "rank3.jsonl holds nothing yet" in captured.err
    assert "nothing of rank(s) 1, 3 of 4" in captured.err
    assert [line.split()[:2] for line in captured.out.splitlines()[2:4]] == [["0", "1"], ["2", "2"]]


def second_rank(written: Writer, **changes: Any) -> None:
    written(0)
    written(1, **changes)


def append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


BROKEN: dict[str, tuple[Callable[[Writer, Path], object], list[str]]] = {
    "no folder": (lambda written, folder: None, ["no rank*.jsonl", "PYALLREDUCE_TRACE="]),
    "no iteration": (lambda written, folder: written(0, starts_s=()), ["finished an iteration"]),
    "another size": (
        lambda written, folder: second_rank(written, size=3),
        ["rank0.jsonl and rank1.jsonl", "different runs", "2 and 3 ranks"],
    ),
    "another run": (
        lambda written, folder: second_rank(written, starts_s=(300.0,)),
        ["rank0.jsonl and rank1.jsonl", "different runs", "folder of its own"],
    ),
    "another boot": (
        lambda written, folder: second_rank(written, clock="x"),
        ["rank0.jsonl and rank1.jsonl", "different runs"],
    ),
    "the same rank twice": (
        lambda written, folder: shutil.copy(written(0), folder / "rank5.jsonl"),
        ["rank0.jsonl and rank5.jsonl", "both of rank 0"],
    ),
    "two processes": (
        lambda written, folder: append(
            written(0), (written(0, folder="b", pid=1).read_text().splitlines()[0])
        ),
        ["rank0.jsonl", "and 1 (of 2)", "folder of its own"],
    ),
    "not JSON": (
        lambda written, folder: append(written(0), "iteration 3"),
        ["rank0.jsonl, line 6"],
    ),
    "not UTF-8": (
        lambda written, folder: written(0).write_bytes(b"\xff\xfe\n"),
        ["rank0.jsonl, line 1"],
    ),
    "no header": (lambda written, folder: written(0).write_text("{}\n"), ["line 1", "no header"]),
    "another format": (
        lambda written, folder: written(0, pyallreduce_trace=99),
        ["format 99", "reads 1"],
    ),
    "a field missing": (
        lambda written, folder: append(written(0), '{"aggregator":0,"iteration":3}'),
        ["line 6", "phases"],
    ),
    "no time": (
        lambda written, folder: append(
            written(0),
            '{"aggregator":0,"iteration":3,"start_s":NaN,"end_s":1e999,"phases":[],"buckets":[]}',
        ),
        ["line 6", "nan is no time"],
    ),
    "not an object": (lambda written, folder: append(written(0), "[1, 2]"), ["line 6"]),
    "rank of nobody": (lambda written, folder: written(2), ["line 1", "rank < size"]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_trace_says_what_is_wrong(
    kind: str, written: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = BROKEN[kind]
    folder = tmp_path / "trace"
    make(written, folder)
    message = refused(capsys, "trace", str(folder))
    assert all(word in message for word in words), message
    assert not (folder / "trace.json").exists()


def test_trace_says_where_it_cannot_write(
    written: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(written(0, size=1).parent)
    output = str(tmp_path / "nowhere" / "x.json")
    assert "cannot write" in refused(capsys, "trace", folder, "-o", output)
