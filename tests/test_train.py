"""The trainer's command line from end to end, on the digits, with few iterations."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pyallreduce as par
from ranks import run_ranks
from train import data, launch, loop, models, profiling, progress, rundir
from train.__main__ import main
from train.config import Config, load_preset, parse
from train.evaluate import Evaluator
from train.job import Job, prepare
from train.metrics import SPLIT, MetricsFile, read_metrics
from train.precision import Precision
from train.watch import Watch

# 4 iterations per epoch; the ramp lasts the first epoch, so a stop in iteration 3 lies inside both.
SMALL = ("--batch-size", "178", "--lr", "0.005", "--momentum-form", "absorbed", "--print-freq", "2")
PICTURES = ("curves", "ranks", "speed", "timeline")
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "PMI_RANK",
    "OMPI_COMM_WORLD_RANK",
    "SLURM_PROCID",
)

pytestmark = pytest.mark.deadline(300)


def environment() -> dict[str, str]:
    """That of a shell without a terminal and without a launcher; the working tree comes first."""
    plain = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    root = str(Path(__file__).parent.parent)
    return {**plain, "PYTHONPATH": os.pathsep.join(filter(None, [root, plain.get("PYTHONPATH")]))}


def train(
    output: Path, *flags: str, launcher: tuple[str, ...] = (sys.executable,), code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Without the seconds for pictures, unless the flags say --report."""
    fixed = ["--output-dir", str(output), "--no-report"]
    command = [*launcher, "-m", "train", "classify", *fixed, *flags]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def content(run: Path) -> dict[str, Any]:
    return torch.load(rundir.checkpoint_files(run)[0], weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two epochs straight, and the same two in three pieces: 3 iterations, 1, and 4."""
    output = tmp_path_factory.mktemp("runs")
    both = (*SMALL, "--nproc", "2")
    straight = train(output, *both, "--name", "straight", "--max-steps", "8", "--report")
    pieces = [
        train(output, *both, "--name", "pieces", "--resume", "auto", "--max-steps", str(steps))
        for steps in (3, 4, 8)
    ]
    return SimpleNamespace(output=output, straight=straight, pieces=pieces)


# A whole run.


def test_run_leaves_its_files(runs):
    names = {p.name for p in (runs.output / "straight").iterdir()}
    assert names == {
        "checkpoints",
        "config.json",
        "env.json",
        "log.txt",
        "metrics.jsonl",
        "summary.csv",
        "timeline.json",
        "report.html",
        "plots",
        *(f"{picture}.png" for picture in PICTURES),
    }
    for picture in PICTURES:
        assert (runs.output / "straight" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    vectors = sorted(p.name for p in (runs.output / "straight" / "plots").iterdir())
    assert vectors == [f"{picture}.svg" for picture in PICTURES]


def test_run_without_a_report_leaves_its_records(runs):
    assert {p.name for p in (runs.output / "pieces").iterdir()} == {
        "checkpoints",
        "config.json",
        "env.json",
        "log.txt",
        "metrics.jsonl",
        "summary.csv",
        "timeline.json",
    }


def test_log_holds_what_was_shown(runs):
    shown = [run.stdout for run in (runs.straight,)]
    assert (runs.output / "straight" / "log.txt").read_text() == "".join(shown)
    shown = [run.stdout for run in runs.pieces]  # a resumed run goes on in its log
    assert (runs.output / "pieces" / "log.txt").read_text() == "".join(shown)


def test_summary_has_a_row_per_epoch(runs):
    with (runs.output / "pieces" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    epochs = [
        r
        for r in read_metrics(runs.output / "pieces" / "metrics.jsonl")
        if r["kind"] == "epoch" and r["step"] in (4, 8)
    ]
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert [float(row["eval_top1"]) for row in rows] == [100 - r["test_error"] for r in epochs]
    assert [float(row["train_loss"]) for row in rows] == [r["train_loss"] for r in epochs]
    # The best five of ten classes hold the best one.
    assert all(0 < r["test_error_top5"] < r["test_error"] for r in epochs)
    assert [float(row["eval_top5"]) for row in rows] == [100 - r["test_error_top5"] for r in epochs]


def test_metrics_have_a_line_per_interval_epoch_and_run(runs):
    lines = (runs.output / "straight" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert all(r["schema"] == 1 for r in records)
    assert [(r["kind"], r["step"]) for r in records] == [
        ("step", 2),
        ("step", 4),
        ("epoch", 4),
        ("step", 6),
        ("step", 8),
        ("epoch", 8),
        ("summary", 8),
    ]
    assert [r["train_images"] for r in records if r["kind"] == "epoch"] == [4 * 356] * 2
    clock = [r["wall_s"] for r in records]
    assert clock == sorted(clock)


def test_parts_of_an_iteration_add_up(runs):
    """On rank 0 between log lines, and on every rank by epoch."""
    records = read_metrics(runs.output / "straight" / "metrics.jsonl")
    for step in (r for r in records if r["kind"] == "step"):
        total_ms = 1e3 * 356 / step["images_per_s"]
        assert sum(step[part] for part in SPLIT) == pytest.approx(total_ms, rel=1e-9)
        assert min(step[part] for part in SPLIT) >= 0
        assert step["comm_exposed_percent"] == pytest.approx(
            100 * step["comm_exposed_ms"] / total_ms
        )
        assert step["comm_exposed_ms"] == pytest.approx(
            (1 - step["overlap_ratio"]) * step["comm_busy_ms"]
        )
        assert len(step["skew_ms"]) == 2
    for epoch in (r for r in records if r["kind"] == "epoch"):
        mean_ms = 1e3 * epoch["train_s"] / 4
        assert sum(epoch["per_rank"][part][0] for part in SPLIT) == pytest.approx(mean_ms, rel=1e-3)
        assert all(len(column) == 2 for column in epoch["per_rank"].values())
        assert epoch["images_per_s"] == pytest.approx(4 * 356 / epoch["train_s"])


def test_gradient_norm_is_logged_where_it_is_measured(tmp_path, runs):
    straight = read_metrics(runs.output / "straight" / "metrics.jsonl")
    assert {r["grad_norm"] for r in straight if r["kind"] == "step"} == {None}
    train(tmp_path, *SMALL, "--max-steps", "2", "--max-norm", "1e9")
    (step,) = (
        r for r in read_metrics(tmp_path / "digits" / "metrics.jsonl") if r["kind"] == "step"
    )
    assert step["grad_norm"] > 0
    assert step["nonfinite"] is None


def test_metrics_are_json_also_when_the_loss_is_not_finite(tmp_path):
    log = MetricsFile(tmp_path / "metrics.jsonl", 0)
    log.write("step", step=1, loss=float("nan"), skew_ms=[float("inf"), 1.0])
    log.close()
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (record["loss"], record["skew_ms"]) == (None, [None, 1.0])


def test_warmup_starts_at_the_reference_rate_and_arrives_at_the_scaled_one(runs):
    schedule = json.loads((runs.output / "straight" / "config.json").read_text())["derived"][
        "schedule"
    ]
    assert schedule["start"] == 0.005
    assert schedule["peak"] == pytest.approx(0.005 * 356 / 32)
    rates = {
        r["step"]: r["lr"]
        for r in read_metrics(runs.output / "straight" / "metrics.jsonl")
        if r["kind"] == "step"
    }
    assert rates[2] == pytest.approx(0.005 + (schedule["peak"] - 0.005) / 4)  # of iteration 1 of 4
    assert rates[6] == rates[8] == schedule["peak"]


def test_every_test_image_counts_once(runs):
    expected = len(data.digits().test)
    records = read_metrics(runs.output / "straight" / "metrics.jsonl")
    counts = [r["test_images"] for r in records if r["kind"] in ("epoch", "summary")]
    assert counts == [expected] * 3
    assert f"({expected} images" in runs.straight.stdout


def test_configuration_and_environment_are_kept(runs):
    config = json.loads((runs.output / "straight" / "config.json").read_text())
    assert (config["batch_size"], config["momentum_form"], config["drops"]) == (
        178,
        "absorbed",
        ["1/3", "2/3", "8/9"],
    )
    assert config["derived"]["minibatch"] == 356
    env = json.loads((runs.output / "straight" / "env.json").read_text())
    assert env["ranks"] == 2
    assert env["launcher"] == "--nproc"
    assert "--nproc 2" in env["command"]
    assert env["packages"]["torch"]


def test_timeline_is_that_of_a_report(runs):
    report = json.loads((runs.output / "straight" / "timeline.json").read_text())
    assert len(report["buckets"]) > 2
    for bucket in report["buckets"]:
        assert 0 <= bucket["ready_s"] <= bucket["start_s"] <= bucket["end_s"] <= report["window_s"]
    assert {p["name"] for p in report["phases"]} >= {"forward", "backward", "update"}


def test_output_is_plain_lines_of_one_rank(runs):
    text = runs.straight.stdout
    assert "\x1b" not in text
    assert "\r" not in text
    for start in ("train ", "recipe ", "run ", "accuracy ", "speed ", "communication ", "files "):
        assert len(re.findall(f"^{start}", text, re.MULTILINE)) == 1
    assert re.search(
        r"^epoch 1/18 \[2/4\]  loss \d\.\d{3} \(\d\.\d{3}\)  lr \S+  [\d,]+ img/s "
        r"\(compute [\d,]+\)  data \S+%  comm-exposed \S+%  mem \S+ GiB  eta \d+:\d\d$",
        text,
        re.MULTILINE,
    )
    assert re.search(
        r"^communication .* ms exposed per iteration .* on \d+ cores$", text, re.MULTILINE
    )
    assert runs.straight.stderr == ""


# Resuming.


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}/{key}")
    elif isinstance(value, list):
        for key, item in enumerate(value):
            yield from leaves(item, f"{path}/{key}")
    else:
        yield path, value


def test_resumed_run_has_the_same_bits(runs):
    straight, pieces = content(runs.output / "straight"), content(runs.output / "pieces")
    for key in ("step", "errors", "model", "optimizer", "ranks"):
        ours, theirs = dict(leaves(straight[key])), dict(leaves(pieces[key]))
        assert ours.keys() == theirs.keys()
        for path, value in ours.items():
            same = (
                torch.equal(value, theirs[path])
                if isinstance(value, torch.Tensor)
                else value == theirs[path]
            )
            assert same, f"{key}{path}"


def test_checkpoint_holds_the_statistics_of_every_worker(runs):
    first, second = content(runs.output / "straight")["ranks"]
    assert not torch.equal(first["bn1.running_mean"], second["bn1.running_mean"])


def test_resuming_continues_the_same_directory_and_log(runs):
    assert sorted(p.name for p in runs.output.iterdir() if p.is_dir()) == ["pieces", "straight"]
    steps = [
        r["step"]
        for r in read_metrics(runs.output / "pieces" / "metrics.jsonl")
        if r["kind"] == "step"
    ]
    assert steps == [2, 3, 4, 6, 8]
    assert "run        " in runs.pieces[0].stdout
    assert "resumed" not in runs.pieces[0].stdout  # auto, and nothing there: a new run
    assert "at iteration 3 of 4" in runs.pieces[1].stdout


def test_truncated_checkpoint_is_refused(runs, tmp_path):
    file = tmp_path / "broken.pt"
    file.write_bytes(rundir.checkpoint_files(runs.output / "pieces")[0].read_bytes()[:-1000])
    done = train(tmp_path, *SMALL, "--nproc", "2", "--resume", str(file), code=2)
    assert "is damaged" in done.stderr
    assert "leave the flag out" in done.stderr
    assert done.stderr.count("\n") == 1  # one rank speaks, no traceback
    assert list(tmp_path.iterdir()) == [file]


# One process, launchers, failures.


def test_one_process_json_and_a_missed_target(tmp_path):
    done = train(tmp_path, "--max-steps", "3", "--assert-top1", "100", "--json", code=3)
    summary = json.loads(done.stdout)
    assert summary["processes"] == 1
    assert summary["communication"]["overlap_ratio"] is None
    assert summary["test_images"] == len(data.digits().test)
    assert "no warmup" in done.stderr
    assert "below the 100 % asked for" in done.stderr


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_launchers(tmp_path, launcher):
    beside = Path(sys.executable).parent / launcher
    program = str(beside) if beside.exists() else shutil.which(launcher)
    if program is None:
        pytest.skip(f"{launcher} is not installed")
    if launcher == "mpirun":
        pytest.importorskip("mpi4py", reason="the rendezvous under mpirun needs mpi4py")
    start = {
        "torchrun": (program, "--nproc-per-node", "2", "--master-port", str(launch.free_port())),
        "mpirun": (program, "-n", "2", sys.executable),
    }[launcher]
    done = train(tmp_path, "--max-steps", "2", launcher=start)
    assert f"2 processes on 1 host by {launcher}, " in done.stdout
    assert done.stdout.count("accuracy ") == 1
    assert (tmp_path / "digits" / "checkpoints" / "step_000002.pt").exists()


def children_of(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_death_of_a_rank_ends_the_others(tmp_path):
    command = [
        sys.executable,
        "-m",
        "train",
        "classify",
        "--output-dir",
        str(tmp_path),
        "--nproc",
        "2",
        "--epochs",
        "1000",
        "--print-freq",
        "1",
    ]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout
        for line in job.stdout:
            if "[ 3/22]" in line:
                break
        ranks = children_of(job.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        _, errors = job.communicate(timeout=60)
    assert time.monotonic() - killed < 20
    assert job.returncode == 128 + signal.SIGKILL
    assert "rank 0: PeerError" in errors
    records = read_metrics(tmp_path / "digits" / "metrics.jsonl")
    assert records[-1]["kind"] == "stopped"
    assert records[-1]["reason"].startswith("PeerError: ")
    assert "Stopped early at iteration" in (tmp_path / "digits" / "report.html").read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def resume_and_drift(comm: par.Communicator, output: Path, update: str) -> None:
    """A checkpoint loads wrongly on rank 1. The file stays as it was, whoever asks to write it."""
    cfg = make_config(output_dir=str(output), name="run", resume="auto", update=update)
    first = prepare(cfg, comm)
    first.save()
    first.aggregator.close()
    comm.barrier()
    (file,) = rundir.checkpoint_files(output / "run")
    written = file.stat()
    jobs = []

    def prepare_wrongly(cfg: Config, comm: par.Communicator) -> Job:
        job = prepare(cfg, comm)
        if comm.rank == 1:
            job.state.model.fc.weight.data[0, 0] += 1e-3
        jobs.append(job)
        return job

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prepare", prepare_wrongly)
        with pytest.raises(par.MismatchError, match=r"weights of fc\.weight") as drift:
            loop.train(cfg, comm)
    assert drift.value.peers == (1,)
    (job,) = jobs
    assert job.state.step == 0
    # Eager: torn, since all ranks' weights have been updated, from rank 1's too.
    refusal, words = {
        "step": (par.MismatchError, "drifted apart"),
        "eager": (RuntimeError, "failed half way"),
    }[update]
    with pytest.raises(refusal, match=words):
        job.save()
    kept = file.stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert list(output.rglob("*.pt")) == [file]  # nor in a folder of the resumed run's own


def resume_and_drift_both_ways(rank: int, size: int, output: str) -> None:
    for update in ("step", "eager"):
        with closing(par.init(timeout_s=20)) as comm:
            resume_and_drift(comm, Path(output) / update, update)


def test_replicas_that_have_drifted_are_not_saved(tmp_path):
    run_ranks(2, resume_and_drift_both_ways, str(tmp_path))


# Bad input.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "x"], "given 'x', accepted: an integer"),
        (["--batch-size", "0"], "--batch-size: given 0, accepted: an integer of at least 1"),
        (["--lr", "nan"], "given 'nan', accepted: a finite number"),
        (["--lr", "-1"], "--lr: given -1.0, accepted: a number above 0"),
        (
            ["--momentum", "1"],
            "--momentum: given 1.0, accepted: a number of at least 0 and below 1",
        ),
        (["--update", "late"], "given 'late', accepted: step or eager"),
        (["--drops", "1/3,x"], "accepted: fractions separated by commas"),
        (["--drops", "2/3,1/3"], "accepted: increasing fractions"),
        (["--preset", "mnist"], "--preset: given 'mnist', accepted: cifar10, digits, "),
        (["--batchsize", "8"], "did you mean --batch-size?"),
        (["--name", "a/b"], "--name: given 'a/b', accepted: a file name"),
        (["--seed", "-1"], "--seed: given -1, accepted: an integer of at least 0"),
    ],
)
def test_wrong_flags_say_what_was_given_and_what_is_accepted(flags, message, capsys):
    try:
        code = main(["classify", *flags])
    except SystemExit as end:  # argparse's way
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_wrong_command(capsys):
    assert main(["segment"]) == 2
    assert "given command 'segment', accepted: classify" in capsys.readouterr().err


def test_nproc_under_a_launcher_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["classify", "--nproc", "2"]) == 2
    assert "leave --nproc out" in capsys.readouterr().err


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        main(["classify", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    flags = set(re.findall(r"--[a-z][a-z0-9-]+", text))
    assert {
        "--preset",
        "--nproc",
        "--epochs",
        "--batch-size",
        "--lr",
        "--reference-minibatch",
        "--warmup-epochs",
        "--momentum",
        "--weight-decay",
        "--momentum-form",
        "--update",
        "--bucket-kib",
        "--seed",
        "--resume",
        "--output-dir",
        "--name",
        "--print-freq",
        "--report",
        "--max-steps",
        "--assert-top1",
        "--json",
    } <= flags
    assert "(default: 0.05)" in text
    assert "(default: 1/3,2/3,8/9)" in text


def test_underscores_are_accepted():
    assert parse("classify", ["--batch_size=8"]).batch_size == 8


def test_a_preset_with_an_unknown_key_is_refused(monkeypatch, tmp_path):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "odd.toml").write_text("epochz = 3\n")
    monkeypatch.setattr("train.config.resources.files", lambda _: tmp_path)
    with pytest.raises(par.UsageError, match="unknown key 'epochz'"):
        load_preset("odd")


# The parts, in this process.


class Alone:
    """The communicator of a single rank, for parts that need no other."""

    rank, size, num_nodes = 0, 1, 1

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None: ...
    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None: ...
    def all_gather(self, output: torch.Tensor, source: torch.Tensor) -> None:
        output.copy_(source.view_as(output))


def make_config(**values: Any) -> Config:
    return Config(**{**load_preset("digits"), **values})


def evaluator(model: nn.Module, comm: Any) -> Evaluator:
    precision = Precision(make_config(), torch.device("cpu"))
    return Evaluator(model, comm, data.digits().test, precision, Watch(comm))


def test_a_run_is_never_covered(tmp_path):
    cfg = make_config(output_dir=str(tmp_path))
    names = [rundir.open_run(cfg, Alone(), None).path for _ in range(3)]
    assert [p.name for p in names if p] == ["digits", "digits-2", "digits-3"]


def test_an_unwritable_output_directory_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(par.UsageError, match=r"--output-dir: given .* accepted: a directory"):
        rundir.open_run(make_config(output_dir=str(file / "runs")), Alone(), None)


def test_an_unwritable_output_directory_ends_with_code_2(tmp_path):
    file = tmp_path / "file"
    file.touch()
    done = train(file, "--max-steps", "1", code=2)
    assert "accepted: a directory" in done.stderr


def test_metrics_behind_the_checkpoint_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsFile(path, 0)
    for step in (2, 4, 6):
        log.write("step", step=step)
    log.write("summary", step=6)
    log.close()
    with path.open("a") as file:
        file.write('{"kind": "st')  # the run was killed while it wrote
    MetricsFile(path, 4).close()
    assert [(r["kind"], r["step"]) for r in read_metrics(path)] == [("step", 2), ("step", 4)]


def test_held_out_images_are_fixed_and_stratified():
    from sklearn.datasets import load_digits

    labels = load_digits().target
    ids = data.held_out(labels)
    assert len(ids) == len(set(ids.tolist())) == 364
    assert ids[:10].tolist() == list(range(10))
    assert ids.sum() == 323_723
    share = np.bincount(labels[ids]) / np.bincount(labels)
    assert ((share >= 0.2) & (share < 0.21)).all()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_evaluation_parts_cover_the_test_set_once(size):
    ids = [i for r in range(size) for i in data.evaluation_part(364, r, size).tolist()]
    assert sorted(ids) == list(range(364))


def test_evaluation_changes_nothing_that_training_reads():
    model = models.build("digits-resnet", 10).train()
    model(torch.randn(8, 1, 8, 8))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    evaluate = evaluator(model, Alone())
    first, second = evaluate(model), evaluate(model)
    assert first == second
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Ranked(nn.Module):
    """Its input as logits: the pixels of an image are the answer."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1)


@pytest.mark.parametrize(("classes", "error5"), [(8, 37.5), (5, 0.0), (3, 0.0)])
def test_top5_error_counts_images_whose_class_is_not_among_the_best_five(classes, error5):
    """Image i has its class in place i of the network's order."""
    logits = torch.arange(classes, 0, -1.0).expand(classes, -1)[..., None, None]
    test = data.Images(logits, torch.arange(classes))
    precision = Precision(make_config(), torch.device("cpu"))
    found = Evaluator(Ranked(), Alone(), test, precision, Watch(Alone()), batch_size=3)(Ranked())
    assert found.error5 == error5
    assert found.correct == 1


@pytest.mark.parametrize(
    ("asked", "step", "last", "expected"),
    [
        (None, 0, 100, range(0)),
        (3, 0, 100, range(10, 13)),
        (3, 40, 100, range(50, 53)),  # resumed
        (3, 0, 5, range(2, 5)),  # a short run: its last ones
        (9, 0, 5, range(5)),
        (3, 5, 5, range(0)),
    ],
)
def test_profiled_iterations_come_after_the_first_ones(asked, step, last, expected):
    assert list(profiling.to_trace(asked, step, last)) == list(expected)


def test_profile_leaves_a_trace_of_the_iterations_asked_for(tmp_path):
    with closing(par.init(timeout_s=20)) as comm:
        output = {"output_dir": str(tmp_path), "report": False}
        loop.train(make_config(batch_size=178, max_steps=4, profile=2, **output), comm)
    run = tmp_path / "digits"
    (file,) = (run / "profiling").rglob("*.gz")
    assert file == run / "profiling" / "traces" / "iteration_3" / "rank0_trace.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    forwards, updates = "aten::cross_entropy_loss", "Optimizer.step#SGD.step"
    assert (names.count(forwards), names.count(updates)) == (2, 2)


def test_a_profile_ends_in_time_and_with_its_epoch_and_with_an_error(tmp_path):
    assert list(profiling.traced("abc", 4, range(6, 9), tmp_path)) == ["a", "b", "c"]
    assert profiling.trace_file(tmp_path, 6).exists()
    one = profiling.traced("abc", 0, range(1), tmp_path)
    assert next(one) == "a"
    assert not profiling.trace_file(tmp_path, 0).exists()
    assert next(one) == "b"
    assert profiling.trace_file(tmp_path, 0).exists()
    interrupted = profiling.traced("abc", 0, range(1, 3), tmp_path)
    assert (next(interrupted), next(interrupted)) == ("a", "b")
    interrupted.close()
    assert profiling.trace_file(tmp_path, 1).exists()
    assert list(profiling.traced("abc", 9, range(6, 9), tmp_path)) == ["a", "b", "c"]
    assert len(list(tmp_path.rglob("*.gz"))) == 3


def test_profile_takes_a_number_or_none():
    assert parse("classify", []).profile is None
    assert parse("classify", ["--profile"]).profile == 5
    assert parse("classify", ["--profile", "3", "--json"]).profile == 3


def test_a_lost_test_image_is_an_error():
    class Lossy(Alone):
        def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None:
            if op == "sum":
                tensor -= 1

    model = models.build("digits-resnet", 10)
    with pytest.raises(RuntimeError, match="counted 363 images instead of 364"):
        evaluator(model, Lossy())(model)


@pytest.mark.parametrize(
    ("rank", "terminal", "term", "expected"),
    [
        (0, True, "xterm", "Bar"),
        (0, True, "dumb", "Lines"),
        (0, False, "xterm", "Lines"),
        (1, True, "xterm", "Silent"),
    ],
)
def test_a_bar_appears_only_on_the_terminal_of_rank_0(monkeypatch, rank, terminal, term, expected):
    monkeypatch.setenv("TERM", term)
    stream = SimpleNamespace(isatty=lambda: terminal, write=len, flush=lambda: None)
    shown = progress.make_progress(rank, 10, stream)
    shown.close()
    assert type(shown).__name__ == expected
