"""The paper's rules as pure functions (PAPER 1.1 to 1.4): no state, no clock, no communication."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from pyallreduce import UsageError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
DROP_FACTOR = 0.1


def linear_scaled_lr(reference_lr: float, minibatch: int, reference_minibatch: int) -> float:
    """The linear scaling rule (PAPER 1.1): k times the images, k times the learning rate."""
    return reference_lr * minibatch / reference_minibatch


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate by iteration: a ramp from `start` to `peak`, then steps down (PAPER 1.2).

    `warmup`, `drops` and `total` count iterations. Calling it with t in [0, total) gives the rate
    of iteration t.
    """

    start: float
    peak: float
    warmup: int
    drops: tuple[int, ...]
    total: int

    @property
    def landmarks(self) -> dict[int, float]:
        """Rates to be met whatever the formula between: the first, and the peak after the ramp."""
        return {0: self.start, self.warmup: self.peak}

    def __call__(self, t: int) -> float:
        if t < self.warmup:
            return self.start + (self.peak - self.start) * t / self.warmup
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
) -> Schedule:
    """The schedule for a minibatch of kn images; drops lie at whole epochs.

    The ramp starts at the reference rate whatever kn is, and exists only for kn above the reference
    minibatch. UsageError when the ramp would not end before the first drop.
    """
    peak = linear_scaled_lr(reference_lr, minibatch, reference_minibatch)
    warm = minibatch > reference_minibatch
    warmup = round(warmup_epochs * steps_per_epoch) if warm else 0
    drop_steps = tuple(round(drop * epochs) * steps_per_epoch for drop in drops)
    total = epochs * steps_per_epoch
    end = min((*drop_steps, total))
    if warmup and warmup >= end:
        raise UsageError(
            f"--warmup-epochs: given {warmup_epochs:g}, accepted: a warmup that ends before the "
            f"first drop of the learning rate, here at epoch {end // steps_per_epoch} of {epochs}; lower "
            "--warmup-epochs or raise --epochs"
        )
    return Schedule(reference_lr if warmup else peak, peak, warmup, drop_steps, total)


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
def initialise(model: nn.Module) -> None:
    """Weights as in PAPER 1.4: He fan-out convolutions, FC N(0, 0.01), gamma 1 and beta 0.

    But gamma 0 in the last batch norm of every residual block: a block starts as its shortcut.

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
    for block in residual_blocks(model):
        nn.init.zeros_(last_norm(block).weight)


def median_error(errors: Sequence[float]) -> float:
    """The error of a run: the median over its last five epochs (PAPER 1.4)."""
    return statistics.median(errors[-5:])
