"""Independent runs of one recipe under several seeds: mean and deviation (PAPER 1.4)."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from typing import Any

import pyallreduce as par
from train import compare, rundir
from train.config import Config
from train.loop import train
from train.report import REPORT

SUMMARY = "runs.json"


def train_runs(cfg: Config, comm: par.Communicator) -> dict[str, Any]:
    """Train `cfg.runs` times; collective, errors as `train`'s. Returns the summary of all runs.

    One run is `train` itself. Several lie in one directory, as seed-0, seed-1, ...; resumed, what
    is finished there is only evaluated, what is not goes on, and what is missing begins.
    """
    if cfg.runs == 1:
        return train(cfg, comm)
    if cfg.resume not in (None, "auto"):
        raise par.UsageError(
            f"--resume: given {cfg.resume!r}, accepted with --runs {cfg.runs}: auto, which goes on "
            "with all of them; or resume a single run without --runs"
        )
    group = rundir.open_group(cfg, comm)
    runs = [train(_one(cfg, seed, group), comm) for seed in _seeds(cfg)]
    summary = summarise(cfg, runs)
    if group.path:
        group.write_json(SUMMARY, {**summary, "directory": str(group.path)})
        if cfg.report:
            compare.write([group.path], [], group.file(REPORT))
        print(_line(summary), file=sys.stderr if cfg.json else sys.stdout, flush=True)
    return summary


def summarise(cfg: Config, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Over runs, each by the median of its last epochs; the deviation is that of a sample."""
    accuracies = [run["accuracy_median"] for run in runs]
    return {
        "accuracy_median": statistics.mean(accuracies),
        "accuracy_deviation": statistics.stdev(accuracies),
        "accuracies": accuracies,
        "seeds": list(_seeds(cfg)),
        "runs": runs,
    }


def _seeds(cfg: Config) -> range:
    return range(cfg.seed, cfg.seed + cfg.runs)


def _one(cfg: Config, seed: int, group: rundir.Run) -> Config:
    place = str(group.path or cfg.output_dir)  # only rank 0 knows, and needs, the directory
    return dataclasses.replace(cfg, runs=1, seed=seed, output_dir=place, name=f"seed-{seed}")


def _line(summary: dict[str, Any]) -> str:
    mean, deviation = summary["accuracy_median"], summary["accuracy_deviation"]
    return (
        f"{len(summary['runs'])} runs        accuracy {mean:.2f} +- {deviation:.2f} % held out, error "
        f"{100 - mean:.2f} +- {deviation:.2f} %: mean and standard deviation of their medians"
    )
