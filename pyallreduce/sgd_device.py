"""SGD of parameters on a GPU: one launch per dtype, and no wait for the device.

What only the device knows it decides: whether a gradient has overflowed (GradScaler), what a learning rate in device
memory is, and, since an overflow leaves it as it was, in which units a corrected momentum is kept then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from pyallreduce import _core, gpu
from pyallreduce._buffer import DTYPES
from pyallreduce.errors import UsageError
from pyallreduce.sgd_rule import change_of_unit, momentum_lr_of, scalars_of

Group = dict[str, Any]
State = Mapping[torch.Tensor, dict[str, Any]]  # an optimizer's
# Addresses of weight, momentum, gradient, low-precision copy; elements; index of the param group.
Piece = tuple[int, int | None, int, int | None, int, int]


def address_of(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def momentum_of(groups: list[Group], state: State) -> list[Any]:
    """Where it lies, which groups want it, and how long these are."""
    addresses = [address_of(entry.get("momentum_buffer")) for entry in state.values()]
    return [*addresses, *((bool(group["momentum"]), len(group["params"])) for group in groups)]


def memory_of(groups: list[Group], state: State) -> list[Any]:
    """All that a table's addresses depend on."""
    seen = momentum_of(groups, state)
    for group in groups:
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                seen.append(None)
            else:
                seen += (param.data_ptr(), grad.data_ptr(), grad.stride(), grad.dtype)
    return seen


class Operands(NamedTuple):
    """Of one parameter's update. ``copy``: the 16-bit parameter, where ``weight`` is its float32 master."""

    weight: torch.Tensor
    momentum: torch.Tensor | None
    grad: torch.Tensor
    copy: torch.Tensor | None

    def piece(self, group: int) -> Piece:
        at = None if self.momentum is None else self.momentum.data_ptr()
        copy = None if self.copy is None else self.copy.data_ptr()
        return (self.weight.data_ptr(), at, self.grad.data_ptr(), copy, self.weight.numel(), group)


class Table:
    """What one launch is told about many parameters, on the host and on the device. ``dtypes``: of weights and
    gradients."""

    def __init__(
        self, where: gpu.Gpu, dtypes: tuple[torch.dtype, torch.dtype], pieces: Sequence[Piece]
    ) -> None:
        weight, grad = (DTYPES[dtype].name for dtype in dtypes)
        self.pieces = list(pieces)
        self.table = _core.kernels.UpdateTable(grad, weight, self.pieces)
        self.image = where.upload(self.table.image())


class DeviceSgd:
    """The device's side of one optimizer's steps."""

    def __init__(self, where: gpu.Gpu) -> None:
        self.gpu = where
        # Where the gradients are summed: once that has been aborted they are worthless.
        self.source: _core.Device | None = None
        self.params: list[torch.Tensor] = []  # that a step updates
        self._tables: dict[tuple[torch.dtype, torch.dtype], Table] = {}
        self._held: list[Any] = []  # so that addresses in the tables stay theirs
        self._seen: list[Any] = []  # when the tables were made
        self._rates: dict[int, torch.Tensor] = {}  # by group: float32
        self._units: dict[int, torch.Tensor] = {}  # float64; 0: none yet
        self._next_units: dict[int, float] = {}  # of rules made since close(), that the host knows

    def prepare(
        self,
        groups: list[Group],
        state: State,
        params: list[torch.Tensor],
        gathered: list[list[Operands]],
    ) -> None:
        """What to update from now on: ``params``, of which ``gathered`` is told by group."""
        pieces: dict[tuple[torch.dtype, torch.dtype], list[Piece]] = {}
        for g, group_operands in enumerate(gathered):
            for operands in group_operands:
                dtypes = (operands.weight.dtype, operands.grad.dtype)
                pieces.setdefault(dtypes, []).append(operands.piece(g))
        known, self._tables = self._tables, {}
        for dtypes, wanted in pieces.items():
            table = known.get(dtypes)
            if table is None or table.pieces != wanted:
                table = Table(self.gpu, dtypes, wanted)
            self._tables[dtypes] = table
        self.params = params
        told = [operands for group in gathered for operands in group]
        self._held = [operands[:2] for operands in told]
        # A gradient in another order than its parameter is copied in each step.
        lasts = all(o.grad is param.grad for o, param in zip(told, params, strict=True))
        self._seen = memory_of(groups, state) if lasts else []

    def is_prepared(self, groups: list[Group], state: State) -> bool:
        """Whether all of it still lies where it did: far cheaper to know than to prepare."""
        try:
            return bool(self._seen) and memory_of(groups, state) == self._seen
        except RuntimeError:  # a sparse gradient has no address
            return False

    def step(
        self,
        groups: list[Group],
        state: State,
        loss_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
    ) -> None:
        """Of what has been prepared. Nothing changes where ``found_inf`` (a float32 on the device) is not zero."""
        rules = self.rules(groups, found_inf is not None)
        gate = {
            "found_inf": address_of(found_inf),
            "aborted": 0 if self.source is None else self.source.aborted,
        }
        for table in self._tables.values():
            self.gpu.launch(
                "update",
                table.table,
                table.image.data_ptr(),
                rules,
                loss_scale=address_of(loss_scale),
                **gate,
            )
        for g, group in enumerate(groups):
            if group["form"] == "absorbed":
                self._change_idle(g, group, state, found_inf)
        self.close(groups, rules, gate)

    def rules(self, groups: list[Group], is_gated: bool) -> list[_core.kernels.UpdateRule]:
        """``is_gated``: whether there will be a step only the device knows."""
        return [self._rule(g, group, is_gated) for g, group in enumerate(groups)]

    def _rule(self, g: int, group: Group, is_gated: bool) -> _core.kernels.UpdateRule:
        lr, corrected = group["lr"], is_corrected(group)
        lies_there = isinstance(lr, torch.Tensor) and gpu.of(lr) is not None
        if not lies_there and not (corrected and (is_gated or g in self._units)):
            if group["form"] == "absorbed":
                self._next_units[g] = momentum_lr_of(group)
            return _core.kernels.UpdateRule(scalars_of(group), change_of_unit(group))
        if lies_there and lr.dtype != torch.float32:
            raise UsageError(f"a learning rate on the device is {lr.dtype}; float32 is needed")
        if not lies_there:
            if g not in self._rates:
                self._rates[g] = self.gpu.empty(1, torch.float32)
            lr = self._rates[g].fill_(float(lr))
        if corrected and g not in self._units:
            unit = self.gpu.empty(1, torch.float64)
            self._units[g] = unit.fill_(group["momentum_lr"] or 0.0)
        return _core.kernels.UpdateRule.on_device(
            form="corrected" if corrected else group["form"],
            decay=float(group["weight_decay"]),
            momentum=float(group["momentum"]),
            nesterov=bool(group["nesterov"]),
            learning_rate=lr.data_ptr(),
            momentum_unit=address_of(self._units.get(g)) if corrected else 0,
        )

    def _change_idle(
        self,
        g: int,
        group: Group,
        state: State,
        found_inf: torch.Tensor | None,
    ) -> None:
        """Remark 2 for momentum that this step does not touch: that of parameters without a gradient."""
        idle = [
            state[param]["momentum_buffer"]
            for param in group["params"]
            if param.grad is None and "momentum_buffer" in state.get(param, {})
        ]
        if not idle or not is_corrected(group):
            return
        if g in self._units:
            change: Any = self._change_on_device(g, group, found_inf)
        else:
            change = change_of_unit(group)
        for buffer in idle:
            buffer.mul_(change)

    def _change_on_device(
        self, g: int, group: Group, found_inf: torch.Tensor | None
    ) -> torch.Tensor:
        unit, lr = self._units[g], group["lr"]
        rate = (lr if isinstance(lr, torch.Tensor) else self._rates[g]).double()
        changes = (rate != 0) & (unit != 0)
        if found_inf is not None:
            changes &= found_inf == 0
        return torch.where(changes, rate / unit, 1.0)

    def close(
        self, groups: list[Group], rules: list[_core.kernels.UpdateRule], gate: dict[str, int]
    ) -> None:
        """After an iteration's last update: units of momentum become those that it has used."""
        if self._units:
            self.gpu.launch("close_step", rules, **gate)
        for g, unit in self._next_units.items():
            groups[g]["momentum_lr"] = unit
        self._next_units.clear()

    def read_units(self, groups: list[Group]) -> None:
        """Into the groups, for a state that is saved. Waits for the device."""
        for g, unit in self._units.items():
            groups[g]["momentum_lr"] = float(unit) or None

    def forget_units(self) -> None:
        """The groups know better: a state was loaded."""
        self._units.clear()


def is_corrected(group: Group) -> bool:
    return bool(group["form"] == "absorbed" and group["correction"])
