"""Which checkpoint continues this run, and whether it may."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyallreduce as par
from train import checkpoint
from train.collective import by_rank_0
from train.config import Config
from train.rundir import checkpoints_to_resume


@dataclasses.dataclass(frozen=True)
class Resumed:
    """`path` is the checkpoint's, on rank 0 only; `notices` say how the run differs from before."""

    content: dict[str, Any]
    path: Path | None
    notices: tuple[str, ...]


def find(cfg: Config, k: int, images: str, comm: par.Communicator) -> Resumed | None:
    """Collective: what --resume asks for, None if it is a new run.

    `k` workers go through the list of images with that fingerprint.

    Damaged files are passed over with a warning on stderr. UsageError on every rank when none is
    intact, or when the intact one belongs to a run with other weights.
    """
    answer = by_rank_0(comm, lambda: _choose(cfg))
    if not answer:
        return None
    path = Path(os.fsdecode(answer)) if comm.rank == 0 else None
    content = checkpoint.load(path, comm)
    stored = content["identity"]
    if cfg.test_only:
        _check_network(stored, cfg, path)
        return Resumed(content, path, ())
    _check(stored, cfg, k, comm.size, path)
    if stored["images"] != images:
        raise par.UsageError(
            f"--resume: {path} was written with another list of training and held-out images; give "
            "the --data-path of then, or leave the flag out to start a new run"
        )
    return Resumed(content, path, tuple(_notices(content, cfg, comm.size)))


def identity(cfg: Config, k: int, images: str, comm: par.Communicator) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it."""
    run = {"processes": comm.size, "workers": k, "preset": cfg.preset, "images": images}
    return {**run, **cfg.recipe()}


def plan(
    cfg: Config, aggregator: par.GradientAggregator, resumed: Mapping[str, Any]
) -> dict[str, Any]:
    """In what pieces gradients are summed: with it a resumed run sums in the same order.

    `resumed` is the plan that this run has begun with; it stands until an iteration has shown one.
    """
    buckets = [{"bytes": b["bytes"], "params": b["params"]} for b in aggregator.report()["buckets"]]
    return {"bucket_kib": cfg.bucket_kib, "buckets": buckets or resumed.get("buckets", [])}


def pinned(cfg: Config, resumed: Resumed | None) -> Config:
    """The configuration with the checkpoint's plan instead of its own."""
    if resumed is None:
        return cfg
    kib = resumed.content["plan"].get("bucket_kib", cfg.bucket_kib)
    return dataclasses.replace(cfg, bucket_kib=kib)


def _choose(cfg: Config) -> bytes:
    try:
        files = checkpoints_to_resume(cfg)
        return os.fsencode(checkpoint.newest_intact(files)) if files else b""
    except par.UsageError as error:
        raise par.UsageError(f"--resume: {error}; leave the flag out to start a new run") from None


def _check_network(stored: Mapping[str, Any], cfg: Config, path: Path | None) -> None:
    """All that an evaluation needs: on how many processes, and with which recipe, is its own."""
    if stored["model"] != cfg.model:
        raise par.UsageError(
            f"--resume: {path} holds a {stored['model']}, this run has --model {cfg.model}; give "
            f"--model {stored['model']}, or the preset of then"
        )


def _check(
    stored: Mapping[str, Any], cfg: Config, k: int, processes: int, path: Path | None
) -> None:
    for flag, (then, now) in cfg.differences(stored, weights=True).items():
        raise par.UsageError(
            f"--resume: {path} was written with {flag} {then}, this run has {now}, which gives other "
            f"weights; run with {flag} {then}, or leave the flag out to start a new run"
        )
    if stored["workers"] != k:
        n = cfg.batch_size
        remedy = (
            f"give --virtual-workers {stored['workers']}"
            if stored["workers"] >= processes
            else f"start at most {stored['workers']} processes"
        )
        raise par.UsageError(
            f"--resume: {path} was written by {stored['workers']} workers of {n} images, this run has "
            f"{k} on {processes} processes: another minibatch, and another learning rate for it. To go "
            f"on with the same minibatches on these processes, {remedy}"
        )


def _notices(content: Mapping[str, Any], cfg: Config, processes: int) -> list[str]:
    stored, plan = content["identity"], content["plan"]
    lines = [
        f"{flag} {now}, was {then}: equal to the run before up to rounding, not bit by bit"
        for flag, (then, now) in cfg.differences(stored, weights=False).items()
    ]
    if stored["processes"] != processes:
        lines.append(
            f"{processes} processes, were {stored['processes']}: the same workers and minibatches, "
            "equal up to rounding, not bit by bit"
        )
    if plan.get("bucket_kib", cfg.bucket_kib) != cfg.bucket_kib:
        lines.append(
            f"--bucket-kib {plan['bucket_kib']} as in the checkpoint, not {cfg.bucket_kib}: the "
            "order of sums belongs to the run"
        )
    return lines
