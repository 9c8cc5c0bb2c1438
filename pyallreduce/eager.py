"""The eager update: a bucket's SGD step belongs to its reduction, while backward still runs. What is common to the
host's (pyallreduce/eager_host.py) and the GPU's (pyallreduce/eager_device.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from pyallreduce.buckets import Bucket
from pyallreduce.errors import UsageError
from pyallreduce.sgd import SGD


def check_optimizer(optimizer: torch.optim.Optimizer | None, buckets: list[Bucket]) -> SGD:
    """UsageError unless it is a par.SGD, free, over exactly the buckets' parameters."""
    if not isinstance(optimizer, SGD):
        raise UsageError('update="eager" needs optimizer=par.SGD(...), which computes the update')
    if optimizer._eager is not None:
        raise UsageError("this optimizer is attached to another aggregator; close that one first")
    slots = {slot.param: slot.name for bucket in buckets for slot in bucket.slots}
    held = {param for group in optimizer.param_groups for param in group["params"]}
    missing = [name for param, name in slots.items() if param not in held]
    if missing or len(held) != len(slots):
        raise UsageError(
            'update="eager" needs an optimizer over exactly the trainable parameters; '
            + (f"it lacks {', '.join(missing[:5])}" if missing else "it holds others too")
        )
    return optimizer


def rule_of(group: dict[str, Any]) -> str:
    """What ranks may have set differently; what lies on a GPU is not asked for."""
    names = {"lr": "lr", "momentum": "momentum", "weight_decay": "weight decay"}
    given = {name: group[key] for key, name in names.items()}
    return ", ".join(
        f"{name} of the GPU's" if getattr(value, "is_cuda", False) else f"{name} {float(value):g}"
        for name, value in given.items()
    )


class Updater(ABC):
    """The eager update of an aggregator's buckets. ``optimizer`` has passed ``check_optimizer``; ``scale`` is that of
    the ranks' summed gradients."""

    is_shared = False  # one copy of the parameters for all ranks of the host

    def __init__(self, buckets: list[Bucket], optimizer: SGD, scale: float) -> None:
        self._buckets, self._optimizer, self._scale = buckets, optimizer, scale
        self._group_of = {
            param: g for g, group in enumerate(optimizer.param_groups) for param in group["params"]
        }
        self._updated = False  # since the last step()
        self.gradients_are_zero = False  # a pass has consumed them, and nothing came since

    def attach(self) -> None:
        """Pairs with detach(). Last in construction, which may fail and then leaves the optimizer free."""
        self.adopt_momentum()
        self._optimizer._eager = self

    @abstractmethod
    def submit(self, bucket: Bucket, layout: int, subject: str) -> Any:
        """Starts the bucket's reduction and update; the learning rates are those of now."""

    @abstractmethod
    def update_clipped(
        self, max_norm: float, works: Sequence[Any], labels: Sequence[tuple[int, str]]
    ) -> float | torch.Tensor:
        """The second of two passes over the buckets, which ``works`` have reduced; returns the norm that they had. If
        it is not finite, no weight or momentum changes. Gradients are zero afterwards. ``labels``: by bucket, layout
        and subject for who compares calls."""

    def begin_backward(self) -> None:
        if self._updated:
            raise UsageError(
                'a second backward before step(): with update="eager" the first has updated the parameters already. '
                "Accumulate under no_sync(), or call step()"
            )
        self.gradients_are_zero = False

    def end_update(self) -> None:
        """All buckets are updated."""
        self.gradients_are_zero = True

    def close_update(self) -> None:
        """``step()``: the next backward may update again."""
        if self._updated:
            self._close_units()
        self._updated = False

    @abstractmethod
    def _close_units(self) -> None:
        """Units of momentum become those that the update has used."""

    @abstractmethod
    def adopt_momentum(self) -> None:
        """After the optimizer was built or has loaded a state."""

    def adopt_weights(self) -> None:
        """After the user may have put others in their place. Collective with shared parameters."""
        return  # used where they lie

    def check_unwritten(self) -> None:
        """UsageError if a shared parameter was written outside ``writing()``, by this rank's Python."""
        return  # none is shared

    def detach(self) -> None:
        """The optimizer is free for another aggregator."""
        self._optimizer._eager = None
