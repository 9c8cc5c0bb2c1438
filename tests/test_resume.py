"""A run that is stopped, killed or damaged goes on to the bits of one that is not, or says why not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import pyallreduce as par
from ranks import outcomes_of, run_ranks
from train import checkpoint, data, launch, loop, models, resume, rundir, signals
from train.__main__ import main
from train.collective import Failure
from train.config import Config, load_preset
from train.evaluate import Evaluator
from train.metrics import read_metrics
from train.watch import Interrupted, Watch

# 11 iterations per epoch with two workers; the ramp ends in the middle of the first epoch.
KN = {"batch_size": 64, "momentum_form": "absorbed", "warmup_epochs": 0.5, "print_freq": 1}
KN |= {"report": False}
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")

DIGITS = data.digits().fingerprint

pytestmark = pytest.mark.deadline(240)


def make_config(output: Path, **values: Any) -> Config:
    return Config(**{**load_preset("digits"), **KN, "output_dir": str(output), **values})


def train_alone(output: Path, **values: Any) -> None:
    """In this process, the only rank."""
    with closing(par.init(timeout_s=20)) as comm:
        loop.train(make_config(output, **values), comm)


def train_rank(rank: int, size: int, output: str, values: dict[str, Any]) -> None:
    train_alone(Path(output), **values)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, f"{path}/{key}")
    else:
        yield path, value


def newest(run: Path) -> dict[str, Any]:
    return checkpoint.read(rundir.checkpoint_files(run)[0])


def assert_same_run(ours: Path, theirs: Path) -> None:
    """The same bits in the newest checkpoint, and the same numbers in the records."""
    a, b = dict(leaves(newest(ours))), dict(leaves(newest(theirs)))
    assert a.keys() == b.keys()
    for path, value in a.items():
        same = torch.equal(value, b[path]) if torch.is_tensor(value) else value == b[path]
        assert same, path
    assert learning_of(ours) == learning_of(theirs)


def learning_of(run: Path) -> list[tuple[Any, ...]]:
    """The records without their times."""
    about = {
        "step": ("lr", "loss", "loss_mean"),
        "epoch": ("lr", "train_loss", "train_error", "train_images", "test_error", "test_loss"),
        "summary": ("accuracy_median", "accuracy_final"),
    }
    records = read_metrics(run / "metrics.jsonl")
    return [
        (r["kind"], r["step"], *(r[key] for key in about[r["kind"]]))
        for r in records
        if r["kind"] in about
    ]


# Killed.

LONG = {"epochs": 2, "drops": (), "checkpoint_every": 4, "name": "run"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run of two ranks over two epochs, and the seconds it took."""
    output = tmp_path_factory.mktemp("uninterrupted")
    started = time.monotonic()
    run_ranks(2, train_rank, str(output), LONG)
    return output / "run", time.monotonic() - started


def train_until_killed(rank: int, size: int, output: str, values: Any, kill_at: Any) -> None:
    after_s, victims = kill_at
    if rank in victims:
        threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    train_rank(rank, size, output, values)


def test_kill_9_at_random_moments_changes_no_bit(uninterrupted, tmp_path):
    straight, seconds = uninterrupted
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)  # shown if it fails
    dice = random.Random(seed)
    values = {**LONG, "resume": "auto"}
    run, kills, steps = tmp_path / "run", 0, [0]
    for _ in range(20):
        victims = dice.choice([(0,), (1,), (0, 1)])
        kill_at = dice.uniform(0.3, 0.7) * seconds, victims
        outcomes = outcomes_of(2, train_until_killed, str(tmp_path), values, kill_at)
        if all(o.error is None and o.exitcode == 0 for o in outcomes):
            break
        assert any(outcomes[rank].exitcode == -signal.SIGKILL for rank in victims), outcomes
        kills += 1
        steps.append(newest(run)["step"] if rundir.checkpoint_files(run) else 0)
        if kills == 2:
            run_ranks(2, train_rank, str(tmp_path), values)
            break
    assert kills, f"never killed (seed {seed})"
    assert steps == sorted(steps)
    assert_same_run(straight, run)


# Asked to stop.


@pytest.fixture
def no_request(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the request that this process has got; none afterwards."""
    monkeypatch.setattr(signals, "_received", 0)
    return lambda number: monkeypatch.setattr(signals, "_received", int(number))


def stop_one_rank(rank: int, size: int, output: str, values: dict[str, Any]) -> int | None:
    """Rank 1 alone gets a real signal, in iteration 5."""
    signals.listen()
    check = Watch.check

    def get_signal(self: Watch, loss: torch.Tensor, step: int, lr: float) -> None:
        if rank == 1 and step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        check(self, loss, step, lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "check", get_signal)
        with pytest.raises(Interrupted, match="stopped by SIGUSR1") as stop:
            train_rank(rank, size, output, values)
    return stop.value.step


def test_a_signal_to_one_rank_stops_all_at_one_iteration(uninterrupted, tmp_path):
    values = {**LONG, "resume": "auto"}
    assert run_ranks(2, stop_one_rank, str(tmp_path), values) == [5, 5]
    assert newest(tmp_path / "run")["step"] == 5
    run_ranks(2, train_rank, str(tmp_path), values)
    assert_same_run(uninterrupted[0], tmp_path / "run")


def test_the_end_of_torchrun_stops_the_ranks_that_it_leaves_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "_parent", None)
    check = Watch.check

    def leave(self: Watch, loss: torch.Tensor, step: int, lr: float) -> None:
        if step == 2:
            monkeypatch.setattr(os, "getppid", lambda: 1)
        check(self, loss, step, lr)

    handlers = {number: signal.getsignal(number) for number in signals.REQUESTS}
    monkeypatch.setattr(Watch, "check", leave)
    try:
        signals.listen(needs_parent=True)
        with pytest.raises(Interrupted, match="stopped by the end of torchrun") as stop:
            train_alone(tmp_path, batch_size=256)
        assert stop.value.step == newest(tmp_path / "digits")["step"] == 3
        signals.listen()  # without torchrun a shell may end, and its run go on
        monkeypatch.setattr(os, "getppid", lambda: 2)
        assert signals.received() == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_request_during_evaluation_costs_only_the_evaluation(
    tmp_path, monkeypatch, no_request, epochs
):
    """Of the last epoch too, after which nothing but its evaluation is left to do."""
    values = {"epochs": epochs, "drops": (), "batch_size": 256, "resume": "auto"}
    train_alone(tmp_path, **values, name="straight")
    evaluate = Evaluator.__call__

    def get_signal(self: Evaluator, model: torch.nn.Module) -> Any:
        no_request(signal.SIGTERM)
        return evaluate(self, model)

    monkeypatch.setattr(Evaluator, "__call__", get_signal)
    with pytest.raises(Interrupted, match="SIGTERM") as stop:
        train_alone(tmp_path, **values, name="stopped")
    assert stop.value.step == 5
    assert newest(tmp_path / "stopped")["errors"] == {}

    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    no_request(0)
    train_alone(tmp_path, **values, name="stopped")
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def start(
    output: Path, *flags: str, launcher: tuple[str, ...] = (), until: str = "[10/"
) -> subprocess.Popen[str]:
    """The trainer as a user starts it, when it has printed those words."""
    root = str(Path(__file__).parent.parent)
    environ = {k: v for k, v in os.environ.items() if k not in LAUNCHERS}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))
    command = [*(launcher or (sys.executable,)), "-m", "train", "classify", "--epochs", "1000"]
    job = subprocess.Popen(
        [*command, "--print-freq", "1", "--output-dir", str(output), *flags],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout
    for line in job.stdout:
        if until in line:
            return job
    raise AssertionError(job.communicate()[1])


def test_sigterm_to_the_parent_of_nproc_ends_with_75(tmp_path):
    with start(tmp_path, "--nproc", "2") as job:
        job.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        _, errors = job.communicate(timeout=60)
    assert time.monotonic() - asked < 20  # the contract
    assert job.returncode == 75
    step = newest(tmp_path / "digits")["step"]
    assert step >= 10
    assert errors == (
        f"python -m train: stopped by SIGTERM; the checkpoint of iteration {step} is written, "
        "--resume continues from it\n"
    )
    # The seconds for pictures belong to who sent the signal; the page and the way to them are there.
    log = (tmp_path / "digits" / "log.txt").read_text()
    assert f"python -m train report {tmp_path / 'digits'}\n" in log
    assert (tmp_path / "digits" / "report.html").exists()
    assert not list((tmp_path / "digits").glob("*.png"))


def test_sigterm_to_torchrun_saves_before_it_kills(tmp_path):
    torchrun = Path(sys.executable).parent / "torchrun"
    if not torchrun.exists():
        pytest.skip("torchrun is not installed")
    port = str(launch.free_port())
    launcher = (str(torchrun), "--nproc-per-node", "2", "--master-port", port)
    with start(tmp_path, launcher=launcher) as job:
        job.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        _, errors = job.communicate(timeout=60)
    assert time.monotonic() - asked < 20
    assert f"the checkpoint of iteration {newest(tmp_path / 'digits')['step']} is written" in errors


# Which checkpoint.


class Alone:
    """The communicator of a single rank, for parts that need no other."""

    rank, size = 0, 1

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None: ...
    def all_gather(self, output: torch.Tensor, source: torch.Tensor) -> None:
        output.copy_(source.view_as(output))


def make_state(step: int, **values: Any) -> checkpoint.TrainState:
    model = models.build("digits-resnet", 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return checkpoint.TrainState(model, optimizer, step=step, **values)


def store(run: Path, step: int, keep: int = 9, **values: Any) -> Path:
    """A checkpoint of that iteration in a run directory."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "config.json").touch()
    content = checkpoint.collect(make_state(step, **values), {}, Alone(), torn=False)
    rundir.Run(run, None).store(content, keep)
    return run / "checkpoints" / f"step_{step:06d}.pt"


def names_in(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_a_checkpoint_is_an_ordinary_file_of_tensors(tmp_path):
    path = store(tmp_path, 7)
    assert checkpoint.read(path)["step"] == 7
    assert "fc.weight" in torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("position", [0.05, 0.3, 0.6, 0.9])
def test_a_flipped_bit_is_noticed(tmp_path, position):
    path = store(tmp_path, 7)
    damaged = bytearray(path.read_bytes())
    damaged[int(position * len(damaged))] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(par.UsageError, match="is damaged"):
        checkpoint.read(path)


@pytest.mark.parametrize("data", [b"", b"nothing of ours"])
def test_other_files_are_refused(tmp_path, data):
    path = tmp_path / "step_000001.pt"
    path.write_bytes(data)
    with pytest.raises(par.UsageError, match=r"--resume: .* is damaged or not a checkpoint"):
        resume.find(make_config(tmp_path, resume=str(path)), 1, DIGITS, Alone())


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(par.UsageError, match="No such file"):
        resume.find(make_config(tmp_path, resume=str(tmp_path / "none.pt")), 1, DIGITS, Alone())


@pytest.mark.parametrize("left", [1000, 0])
def test_a_truncated_one_falls_back_to_the_one_before(tmp_path, capsys, left):
    values = {"epochs": 2, "batch_size": 256, "checkpoint_every": 2, "name": "run"}
    train_alone(tmp_path, **values, max_steps=4)
    run = tmp_path / "run"
    last = rundir.checkpoint_files(run)[0]
    assert last.name == "step_000004.pt"
    last.write_bytes(last.read_bytes()[:left])
    train_alone(tmp_path, **values, resume=str(run))
    captured = capsys.readouterr()
    assert f"warning: {last} is damaged" in captured.err
    assert "step_000002.pt at iteration 2 of 10" in captured.out
    assert "step_000004.pt.unused" in names_in(run)

    train_alone(tmp_path, **{**values, "name": "straight"})
    assert_same_run(tmp_path / "straight", run)


def test_without_an_intact_one_the_run_does_not_begin_anew(tmp_path, capsys):
    for step in (1, 2):
        store(tmp_path / "digits", step).write_bytes(b"x")
    cfg = make_config(tmp_path, resume="auto")
    with pytest.raises(par.UsageError, match=r"step_000002.pt is damaged .*leave the flag out"):
        resume.find(cfg, 1, DIGITS, Alone())
    assert "step_000001" not in capsys.readouterr().err.replace("000002", "")


def test_a_directory_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(par.UsageError, match="has no checkpoint; accepted"):
        resume.find(make_config(tmp_path, resume=str(tmp_path)), 1, DIGITS, Alone())


def test_auto_resumes_the_newest_run_of_the_name(tmp_path):
    for name in ("digits", "digits-2", "digits-other"):
        store(tmp_path / name, 3)
    (tmp_path / "digits-3").mkdir()
    cfg = make_config(tmp_path, resume="auto")
    (found,) = rundir.checkpoints_to_resume(cfg)
    assert found == tmp_path / "digits-2" / "checkpoints" / "step_000003.pt"
    assert rundir.open_run(cfg, Alone(), found).path == tmp_path / "digits-2"


def test_auto_begins_a_new_run_when_there_is_none(tmp_path):
    cfg = make_config(tmp_path / "new", resume="auto")
    assert resume.find(cfg, 1, DIGITS, Alone()) is None


def test_an_older_checkpoint_sets_later_ones_aside(tmp_path):
    older, _ = store(tmp_path / "digits", 3), store(tmp_path / "digits", 6)
    rundir.open_run(make_config(tmp_path), Alone(), older)
    assert [n for n in names_in(tmp_path / "digits") if "step" in n] == [
        "step_000003.pt",
        "step_000006.pt.unused",
    ]


def test_a_copy_elsewhere_continues_in_a_new_directory(tmp_path):
    copy = tmp_path / "copy.pt"
    store(tmp_path / "digits", 3).rename(copy)
    assert rundir.open_run(make_config(tmp_path), Alone(), copy).path == tmp_path / "digits-2"


def test_the_newest_and_the_best_are_kept(tmp_path):
    errors: dict[int, float] = {}
    for epoch, error in enumerate([9.0, 3.0, 5.0, 4.0, 6.0]):
        errors[epoch] = error
        step = 10 * (epoch + 1)
        store(tmp_path, step, keep=2, errors=dict(errors), evaluated=step)
    store(tmp_path, 55, keep=2, errors=errors, evaluated=50)
    kept = ["step_000020.pt", "step_000050.pt", "step_000055.pt"]
    assert names_in(tmp_path) == ["best.json", "last.json", *kept]
    pointers = [
        json.loads((tmp_path / f"checkpoints/{n}.json").read_text()) for n in ("best", "last")
    ]
    assert pointers == [
        {"file": "step_000020.pt", "step": 20, "epoch": 1, "test_error": 3.0},
        {"file": "step_000055.pt", "step": 55},
    ]


# What is not saved.


def test_torn_weights_are_not_saved():
    with pytest.raises(Failure, match="not writing a checkpoint: an update failed half way"):
        checkpoint.collect(make_state(1), {}, Alone(), torn=True)


def test_weights_that_are_not_finite_are_not_saved():
    state = make_state(8)
    with torch.no_grad():
        state.model.get_parameter("fc.bias")[3] = float("nan")
    with pytest.raises(FloatingPointError, match="rank 0 are not finite after iteration 8"):
        checkpoint.collect(state, {}, Alone(), torn=False)


def part_and_save(rank: int, size: int, output: str) -> None:
    torch.manual_seed(0)
    state = make_state(8)
    if rank == 1:
        state.model.get_parameter("fc.bias").data[3] += 1e-6
    with (
        closing(par.init(timeout_s=20)) as comm,
        pytest.raises(par.MismatchError, match="rank 1 has other weights") as error,
    ):
        checkpoint.collect(state, {}, comm, torn=False)
    assert error.value.peers == (1,)


def test_replicas_that_differ_are_not_saved(tmp_path):
    run_ranks(2, part_and_save, str(tmp_path))


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    before = store(tmp_path, 7).read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    words = r"step_000008.pt cannot be written \(No space .* the last good one is .*step_000007.pt"
    with pytest.raises(Failure, match=words):
        store(tmp_path, 8)
    assert names_in(tmp_path) == ["last.json", "step_000007.pt"]
    assert (tmp_path / "checkpoints" / "step_000007.pt").read_bytes() == before


def fill_the_disk(rank: int, size: int, output: str, values: dict[str, Any]) -> str:
    """No file may grow beyond half a checkpoint from iteration 3 on."""
    check = Watch.check

    def limit(self: Watch, loss: torch.Tensor, step: int, lr: float) -> None:
        if step == 2:
            half = newest(Path(output) / "run")["model"]["conv1.weight"].nbytes
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(half, 1 << 19), resource.RLIM_INFINITY))
        check(self, loss, step, lr)

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "check", limit)
        with pytest.raises(Failure) as failure:
            train_rank(rank, size, output, values)
    return str(failure.value)


def test_a_full_disk_ends_all_ranks_with_the_last_good_checkpoint(tmp_path):
    values = {"name": "run", "checkpoint_every": 2}
    first, second = run_ranks(2, fill_the_disk, str(tmp_path), values)
    assert first == second
    assert "step_000004.pt cannot be written (File too large)" in first
    assert "step_000002.pt. Make room" in first
    assert newest(tmp_path / "run")["step"] == 2
    assert names_in(tmp_path / "run") == ["last.json", "step_000002.pt"]


def poison(rank: int, size: int, output: str, values: dict[str, Any]) -> tuple[str, bool]:
    """Rank 1's loss in iteration 6 is not finite. Its weights are those before it, if not eager."""
    add = loop.RunLog.iteration
    jobs = []

    def remember(self: Any, lr: float) -> None:
        jobs.append(self._job)
        if rank == 1 and self._job.state.step == 5:
            self._job.dataset.train.pixels.fill_(float("inf"))
        add(self, lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.RunLog, "iteration", remember)
        with pytest.raises(FloatingPointError) as error:
            train_rank(rank, size, output, values)
    model = jobs[0].state.model
    return str(error.value), all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("update", ["step", "eager"])
def test_a_loss_that_is_not_finite_ends_all_ranks_together(tmp_path, update):
    values = {"name": "run", "checkpoint_every": 4, "update": update}
    results = run_ranks(2, poison, str(tmp_path), values)
    words = "the loss of rank 1 is not finite in iteration 6, at learning rate 0.175; nothing"
    assert all(text.startswith(words) for text, _ in results), results
    assert [finite for _, finite in results] == [update == "step"] * 2
    assert newest(tmp_path / "run")["step"] == 4


def test_divergence_ends_with_code_1_and_one_line(tmp_path):
    with start(tmp_path, "--lr", "1e30", until="lr 1e+30") as job:
        _, errors = job.communicate(timeout=60)
    assert job.returncode == 1
    (line,) = errors.splitlines()
    assert "is not finite in iteration" in line
    assert rundir.checkpoint_files(tmp_path / "digits") == []


# Whose checkpoint.


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three iterations of two virtual workers on one process."""
    output = tmp_path_factory.mktemp("short")
    train_alone(output, virtual_workers=2, max_steps=3, name="run")
    return output / "run"


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("model", "resnet50", r"--model digits-resnet, this run has resnet50"),
        (
            "lr",
            0.025,
            r"--lr 0.05, this run has 0.025, which gives other weights; run with --lr 0.05",
        ),
        ("batch_size", 32, r"--batch-size 64, this run has 32"),
        ("seed", 1, r"--seed 0, this run has 1"),
        ("drops", (), r"--drops 1/3,2/3,8/9, this run has "),
        ("precision", "bf16", r"--precision fp32, this run has bf16"),
    ],
)
def test_a_flag_that_changes_the_weights_is_refused_by_name(short, flag, value, words):
    cfg = make_config(short.parent, resume=str(short), **{flag: value})
    with pytest.raises(
        par.UsageError, match=r"--resume: .*step_000003.pt was written with " + words
    ):
        resume.find(cfg, 2, DIGITS, Alone())


def test_other_images_are_refused(short):
    cfg = make_config(short.parent, resume=str(short))
    with pytest.raises(par.UsageError, match="with another list of training and held-out images"):
        resume.find(cfg, 2, "others", Alone())


def test_another_number_of_workers_is_refused_with_the_way_out(short):
    cfg = make_config(short.parent, resume=str(short))
    with pytest.raises(
        par.UsageError, match=r"by 2 workers of 64 images.*give --virtual-workers 2"
    ):
        resume.find(cfg, 1, DIGITS, Alone())


def test_flags_that_leave_the_weights_alone_may_change(short):
    values = {"update": "eager", "print_freq": 3, "keep": 1, "timeout_s": 5.0, "preset": "other"}
    found = resume.find(make_config(short.parent, resume=str(short), **values), 2, DIGITS, Alone())
    assert found
    assert found.notices == ()


def test_a_change_of_rounding_is_told_and_the_plan_stays(short):
    values = {"channels_last": True, "bucket_kib": 64}
    cfg = make_config(short.parent, resume=str(short), **values)
    found = resume.find(cfg, 2, DIGITS, Alone())
    assert found
    rounding, plan = found.notices
    assert rounding.startswith(
        "--channels-last true, was none: equal to the run before up to rounding"
    )
    assert plan.startswith("--bucket-kib 256 as in the checkpoint, not 64")
    assert resume.pinned(cfg, found).bucket_kib == 256
    assert sum(b["bytes"] for b in found.content["plan"]["buckets"]) >= 4 * 308_074


def test_the_same_workers_continue_on_another_number_of_processes(tmp_path, capsys):
    """Two on one process, then one on each of two: equal up to rounding."""
    values = {"virtual_workers": 2, "max_steps": 15, "resume": "auto"}
    train_alone(tmp_path, **values, name="straight")
    train_alone(tmp_path, **{**values, "max_steps": 6}, name="moved")
    run_ranks(2, train_rank, str(tmp_path), {**values, "name": "moved"})
    straight, moved = newest(tmp_path / "straight"), newest(tmp_path / "moved")
    assert moved["step"] == straight["step"] == 15
    for name, value in straight["model"].items():
        torch.testing.assert_close(moved["model"][name], value, rtol=1e-3, atol=1e-4)
    images = [
        r["train_images"]
        for r in read_metrics(tmp_path / "moved" / "metrics.jsonl")
        if r["kind"] == "epoch"
    ]
    assert images == [6 * 128, 11 * 128, 4 * 128]


# Ports.


def test_nproc_needs_no_port_beside_the_one_it_asks_for(tmp_path, monkeypatch):
    """MASTER_PORT + 1, where the library would meet by itself, is taken."""
    import socket

    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(socket.socket())
        while True:
            port = launch.free_port()
            try:
                taken.bind(("127.0.0.1", port + 1))
                break
            except (OSError, OverflowError):
                continue
        taken.listen()
        monkeypatch.setattr(launch, "free_port", lambda: port)
        for name in LAUNCHERS:
            monkeypatch.delenv(name, raising=False)
        flags = ["--nproc", "2", "--max-steps", "1", "--output-dir", str(tmp_path)]
        assert main(["classify", *flags]) == 0
