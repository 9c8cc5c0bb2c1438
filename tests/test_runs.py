"""--runs: independent runs of one recipe, their mean and deviation."""

from __future__ import annotations

import json
import statistics
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import pyallreduce as par
from ranks import run_ranks
from train.config import Config, load_preset
from train.metrics import read_metrics
from train.runs import summarise, train_runs


def config(output: str, **values: Any) -> Config:
    small = {"batch_size": 178, "max_steps": 2, "seed": 3, "report": False}
    return Config(**{**load_preset("digits"), "output_dir": output, **small, **values})


def two_runs_then_one_and_a_resumption(rank: int, size: int, output: str) -> Any:
    with closing(par.init(timeout_s=20)) as comm:
        group = train_runs(config(output, runs=2, name="group"), comm)
        alone = train_runs(config(output, seed=4, name="alone"), comm)
        further = config(output, runs=3, name="group", resume="auto", max_steps=3)
        whole = train_runs(further, comm)
        only = {
            "name": "tested",
            "seed": 0,  # neither this nor the minibatch is the run's: only the network counts
            "batch_size": 32,
            "test_only": True,
            "resume": f"{output}/alone",
            "max_steps": None,
        }
        tested = [
            train_runs(config(output, **only, bn_statistics=statistics), comm)
            for statistics in ("worker0", "recomputed")
        ]
        return group, alone, whole, tested


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def summaries(output: Path) -> list[Any]:
    return run_ranks(2, two_runs_then_one_and_a_resumption, str(output), deadline_s=100)


def test_runs_differ_by_their_seed_only(output, summaries):
    configs = [
        json.loads((output / "group" / f"seed-{seed}" / "config.json").read_text())
        for seed in (3, 4)
    ]
    for key in configs[0].keys() - {"seed", "name", "max_steps", "resume", "runs"}:
        assert len({str(c[key]) for c in configs}) == 1
    assert [c["seed"] for c in configs] == [3, 4]


def test_a_run_of_several_is_the_run_of_its_seed(summaries):
    group, alone, *_ = summaries[0]
    (losses, other, theirs) = (
        [r["loss"] for r in read_metrics(Path(run["directory"]) / "metrics.jsonl") if "loss" in r]
        for run in (alone, group["runs"][0], group["runs"][1])
    )
    assert theirs[: len(losses)] == losses != other[: len(losses)]


def test_every_rank_has_the_same_summary(summaries):
    for key in ("accuracy_median", "accuracy_deviation", "accuracies", "seeds"):
        assert summaries[0][0][key] == summaries[1][0][key]


def test_the_summary_is_kept(output, summaries):
    kept = json.loads((output / "group" / "runs.json").read_text())
    last = summaries[0][2]
    assert kept["accuracies"] == last["accuracies"] == [r["accuracy_median"] for r in last["runs"]]
    assert kept["accuracy_deviation"] == statistics.stdev(last["accuracies"])


def test_resuming_goes_on_with_all_and_begins_what_is_missing(output, summaries):
    last = summaries[0][2]
    assert [run["step"] for run in last["runs"]] == [3, 3, 3]
    assert [Path(run["directory"]).name for run in last["runs"]] == [
        "seed-3",
        "seed-4",
        "seed-5",
    ]
    assert sorted(p.name for p in output.iterdir()) == ["alone", "group", "tested", "tested-2"]


def test_only_evaluating_leaves_the_run_alone(output, summaries):
    _, alone, _, tested = summaries[0]
    assert [run["step"] for run in tested] == [2, 2]
    assert tested[0]["accuracy_final"] == alone["accuracy_final"]
    assert tested[0]["bn_statistics"] == "worker 0's running statistics"
    assert tested[1]["bn_statistics"].startswith("statistics recomputed over 1408 training images")
    assert json.loads((output / "alone" / "config.json").read_text())["test_only"] is False
    assert not list((output / "tested").rglob("*.pt"))
    # Two iterations are too few for a running average, so the two kinds cannot agree by chance.
    assert tested[1]["accuracy_median"] != tested[0]["accuracy_median"]


def test_evaluating_needs_a_checkpoint():
    with pytest.raises(par.UsageError, match="--test-only: given without --resume"):
        config("", test_only=True)


def another_network(rank: int, size: int, output: str) -> str:
    values = {
        "test_only": True,
        "resume": f"{output}/alone",
        "model": "fashion-resnet8",
        "name": "no",
    }
    with (
        closing(par.init(timeout_s=20)) as comm,
        pytest.raises(par.UsageError) as refused,
    ):
        train_runs(config(output, **values), comm)
    return str(refused.value)


def test_evaluating_needs_the_same_network(output, summaries):
    for message in run_ranks(2, another_network, str(output)):
        assert "holds a digits-resnet" in message
        assert "give --model digits-resnet" in message


def test_mean_and_deviation():
    runs = [{"accuracy_median": a} for a in (97.0, 98.0, 99.0, 98.0, 98.0)]
    summary = summarise(config("", runs=5), runs)
    assert summary["accuracy_median"] == 98
    assert summary["accuracy_deviation"] == pytest.approx(0.5**0.5)  # over n - 1
    assert summary["seeds"] == [3, 4, 5, 6, 7]


def test_a_single_checkpoint_is_no_start_of_several_runs():
    with pytest.raises(par.UsageError, match="accepted with --runs 2: auto"):
        train_runs(config("", runs=2, resume="runs/digits"), None)  # refused before anything
