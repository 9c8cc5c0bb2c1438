"""The paper's rules as pure functions (PAPER 1.1 to 1.4): no state, no clock, no communication."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from pyallreduce import UsageError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
DROP_FACTOR = 0.1


def number_of_workers(
    batch_size: int, minibatch: int | None, virtual_workers: int | None, processes: int
) -> int:
    """k, the number of logical workers: as asked for, or kn / n, or one per process.

    UsageError when kn is no multiple of n, is not kn, or leaves a process without a worker.
    """
    if minibatch is not None and minibatch % batch_size:
        raise UsageError(
            f"--minibatch: given {minibatch}, accepted: a multiple of the {batch_size} images per "
            f"worker, such as {max(1, round(minibatch / batch_size)) * batch_size}; change "
            "--minibatch or --batch-size"
        )
    k = virtual_workers or (minibatch or processes * batch_size) // batch_size
    if minibatch not in (None, k * batch_size):
        raise UsageError(
            f"--virtual-workers: given {virtual_workers}, but --minibatch {minibatch} with "
            f"{batch_size} images per worker needs {(minibatch or 0) // batch_size}; give one of the two"
        )
    if k < processes:
        raise UsageError(
            f"{'--virtual-workers' if virtual_workers else '--minibatch'}: {k} workers of "
            f"{batch_size} images for {processes} processes, accepted: at least one worker per "
            "process; start fewer processes, lower --batch-size or raise the flag"
        )
    return k


def linear_scaled_lr(reference_lr: float, minibatch: int, reference_minibatch: int) -> float:
    """The linear scaling rule (PAPER 1.1): k times the images, k times the learning rate."""
    return reference_lr * minibatch / reference_minibatch


def sqrt_scaled_lr(reference_lr: float, minibatch: int, reference_minibatch: int) -> float:
    """For comparison (PAPER table 2a): keeps the variance of an update, and loses 2.5 points."""
    return reference_lr * math.sqrt(minibatch / reference_minibatch)


def fixed_lr(reference_lr: float, minibatch: int, reference_minibatch: int) -> float:
    """For comparison (PAPER table 2a): the reference rate for every minibatch; loses 18 points."""
    return reference_lr


LR_RULES = {"linear": linear_scaled_lr, "sqrt": sqrt_scaled_lr, "fixed": fixed_lr}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate by iteration: `start`, `peak` after the warmup, steps down (PAPER 1.2).

    Between start and peak lies a ramp of equal steps, or with `gradual` False one jump. `warmup`,
    `drops` and `total` count iterations. Calling it with t in [0, total) gives the rate of
    iteration t.
    """

    start: float
    peak: float
    warmup: int
    drops: tuple[int, ...]
    total: int
    gradual: bool = True

    @property
    def landmarks(self) -> dict[int, float]:
        """Rates to be met whatever lies between: the first, and the peak after the warmup."""
        return {0: self.start, self.warmup: self.peak}

    def __call__(self, t: int) -> float:
        if t < self.warmup:
            ramp = (self.peak - self.start) * t / self.warmup
            return self.start + ramp if self.gradual else self.start
        return self.peak * DROP_FACTOR ** sum(t >= drop for drop in self.drops)


def make_schedule(
    *,
    minibatch: int,
    steps_per_epoch: int,
    epochs: int,
    reference_lr: float,
    reference_minibatch: int,
    warmup_epochs: float,
    drops: Sequence[Fraction],
    lr_rule: str = "linear",
    warmup: str = "gradual",
) -> Schedule:
    """The schedule for a minibatch of kn images; drops lie at whole epochs.

    The warmup starts at the reference rate whatever kn is, and exists only for a peak above it.
    UsageError when it would not end before the first drop.
    """
    peak = LR_RULES[lr_rule](reference_lr, minibatch, reference_minibatch)
    warms = warmup != "none" and peak > reference_lr
    warm_steps = round(warmup_epochs * steps_per_epoch) if warms else 0
    drop_steps = tuple(round(drop * epochs) * steps_per_epoch for drop in drops)
    total = epochs * steps_per_epoch
    end = min((*drop_steps, total))
    if warm_steps and warm_steps >= end:
        raise UsageError(
            f"--warmup-epochs: given {warmup_epochs:g}, accepted: a warmup that ends before the "
            f"first drop of the learning rate, here at epoch {end // steps_per_epoch} of {epochs}; lower "
            "--warmup-epochs or raise --epochs"
        )
    start = reference_lr if warm_steps else peak
    return Schedule(start, peak, warm_steps, drop_steps, total, gradual=warmup != "constant")


def set_lr(optimizer: torch.optim.Optimizer, schedule: Schedule, t: int) -> float:
    """Give every parameter group the rate of iteration t; returns it.

    RuntimeError when a ramp does not start at the reference rate or does not arrive at the peak.
    """
    rate = schedule(t)
    if rate != schedule.landmarks.get(t, rate):
        raise RuntimeError(
            f"learning rate {rate} in iteration {t}, the recipe has "
            f"{schedule.landmarks[t]}: the warmup is wrong"
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for the optimizer: with decay, and without (gamma and beta of batch norm).

    The paper does not mention the bias of the last layer: it decays, as in fb.resnet.torch.
    Frozen parameters are in neither group.
    """
    exempt = {
        id(p)
        for m in model.modules()
        if isinstance(m, BATCH_NORMS)
        for p in m.parameters(recurse=False)
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in exempt], "weight_decay": 0.0},
    ]


def residual_blocks(model: nn.Module) -> list[nn.Module]:
    """The residual blocks of a ResNet in torchvision's vocabulary (ours uses it too)."""
    return [m for m in model.modules() if hasattr(m, "downsample") and hasattr(m, "bn2")]


def last_norm(block: nn.Module) -> nn.BatchNorm2d:
    """The batch norm just before the addition: bn3 of a bottleneck, bn2 of a basic block."""
    return getattr(block, "bn3", None) or block.bn2  # type: ignore[return-value]


@torch.no_grad()
def initialise(model: nn.Module, zero_gamma: bool = True) -> None:
    """Weights as in PAPER 1.4: He fan-out convolutions, FC N(0, 0.01), gamma 1 and beta 0.

    But with `zero_gamma`, gamma 0 in the last batch norm of every residual block: it starts as its
    shortcut.

    The batch norm of a projection shortcut keeps gamma 1: with 0 the block would pass nothing on.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, BATCH_NORMS):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
            nn.init.zeros_(module.bias)
    for block in residual_blocks(model) if zero_gamma else ():
        nn.init.zeros_(last_norm(block).weight)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, BATCH_NORMS)]


@contextmanager
def frozen_statistics(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Batch norm inside normalises by its samples as ever, and leaves the running averages alone."""
    for norm in norms:
        norm.track_running_stats = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True  # type: ignore[assignment]


def median_error(errors: Sequence[float]) -> float:
    """The error of a run: the median over its last five epochs (PAPER 1.4)."""
    return statistics.median(errors[-5:])
