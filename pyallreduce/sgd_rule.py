"""The factors of one SGD step with a param group as it is now (csrc/kernels/sgd_rule.h has the formula)."""

from __future__ import annotations

from typing import Any

from pyallreduce import _core

Scalars = _core.kernels.SgdScalars


def scalars_of(group: dict[str, Any]) -> Scalars:
    """The arguments of the rule for one step with this param group as it is now."""
    lr, momentum = float(group["lr"]), float(group["momentum"])
    if group["form"] == "reference":
        history, gain, rate = momentum, 1.0, lr
    elif not group["correction"]:
        history, gain, rate = momentum, lr, 1.0
    else:
        history = momentum * change_of_unit(group)
        gain, rate = momentum_lr_of(group), 1.0 if lr else 0.0
    return Scalars(
        decay=float(group["weight_decay"]),
        history=history,
        gain=gain,
        momentum=momentum,
        rate=rate,
        nesterov=bool(group["nesterov"]),
    )


def momentum_lr_of(group: dict[str, Any]) -> float:
    """Learning rate in whose units a corrected, absorbed momentum is kept from this step on. While lr is 0 it stays
    what it was: the weights rest, the history goes on, and the next change is still exact."""
    return float(group["lr"]) or group["momentum_lr"] or 1.0


def change_of_unit(group: dict[str, Any]) -> float:
    """Remark 2: what this step multiplies an absorbed momentum by, also that of parameters without a gradient."""
    if group["form"] == "reference" or not group["correction"] or group["momentum_lr"] is None:
        return 1.0
    change: float = momentum_lr_of(group) / group["momentum_lr"]
    return change
