"""Fused SGD with momentum correction: one pass over memory per parameter (paper, section 3, Remark 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch.autograd.graph import increment_version

from pyallreduce import _core, gpu
from pyallreduce._buffer import DTYPES, is_dense
from pyallreduce.errors import UsageError
from pyallreduce.sgd_device import DeviceSgd, Operands
from pyallreduce.sgd_rule import change_of_unit, momentum_lr_of, scalars_of

FORMS = ("reference", "absorbed")

HALVES = (torch.bfloat16, torch.float16)
_Mark = tuple[int, int]  # version and address


class AttachedUpdate(Protocol):
    """An aggregator that updates the parameters during backward, with this optimizer's factors and momentum."""

    gradients_are_zero: bool

    def close_update(self) -> None: ...
    def adopt_momentum(self) -> None: ...


class SGD(torch.optim.Optimizer):
    """SGD with momentum, Nesterov by default; weights, momentum and gradients are read and written in one pass.

    ``form="reference"`` (PyTorch, paper eq. 9): u = m u + g, w -= lr u. Needs no correction when lr changes.
    ``form="absorbed"`` (Caffe, paper eq. 10): v = m v + lr g, w -= v. With ``correction`` v is rescaled by
    lr_t / lr_{t-1} at every change of lr (Remark 2), which makes both forms equal; without, the paper's pitfall.

    g includes weight_decay * w (coupled L2, Remark 1), added once to the aggregated gradient. ``state_dict()`` has the
    layout of torch.optim.SGD; the learning rate that an absorbed momentum contains is in its param_groups.
    Parameters of float64, float32, bfloat16, float16 (16-bit: computed in float32), all on the CPU or on one GPU.
    ``master_weights``: what is updated of a 16-bit parameter is a float32 master in its state, with a float32 momentum;
    the parameter is the master, rounded in the same pass. Steps smaller than half a unit in the last place add up then.
    Who writes the parameter, by loading a model for one, writes the master.
    Honours ``grad_scale`` and ``found_inf`` as torch.amp.GradScaler sets them: an overflow changes neither weights nor
    momentum.

    On a GPU: one launch per dtype, and no wait for the device, with GradScaler neither. ``lr`` may be a float32 tensor
    there, which is read when the launch runs: a replayed CUDA graph follows it (capture after one step without).
    """

    _step_supports_amp_scaling = True
    # In the class: a copy or a pickle is attached to nothing.
    _eager: AttachedUpdate | None = None
    _on_device: DeviceSgd | None = None
    master_weights = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        nesterov: bool = True,
        form: str = "reference",
        correction: bool = True,
        master_weights: bool = False,
    ) -> None:
        self.master_weights = master_weights
        # By 16-bit parameter: what it was when its master was last rounded into it.
        self._written: dict[torch.Tensor, _Mark] = {}
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": 0,  # torch.optim.SGD reads it when it loads our state
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "form": form,
            "correction": correction,
            "momentum_lr": None,  # absorbed form: the momentum buffers are in units of this learning rate
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._eager is not None:
            raise UsageError(
                "an eager aggregator updates a fixed set of parameters; close it first"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
            for param in group["params"]:
                if param.device.type not in ("cpu", "cuda") or param.dtype not in DTYPES:
                    raise UsageError(
                        f"a parameter is {param.dtype} on {param.device}; floating CPU or CUDA parameters are needed"
                    )
        except UsageError:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "master_weights": self.master_weights}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._written = {}
        for group in self.param_groups:
            if (
                "form" not in group
            ):  # of torch.optim.SGD: a reference momentum is an absorbed one in units of lr = 1
                absorbed = self.defaults["form"] == "absorbed"
                group |= {
                    "form": self.defaults["form"],
                    "correction": self.defaults["correction"],
                    "momentum_lr": 1.0 if absorbed else None,
                }
            if group.get("dampening") or group.get("maximize"):
                raise UsageError(
                    "a state with dampening or maximize cannot be loaded: SGD has neither"
                )
            _check(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of this class or of torch.optim.SGD. Local; with an eager aggregator all ranks load the same state."""
        for group in state_dict["param_groups"]:  # before anything changes
            if group.get("dampening") or group.get("maximize"):
                raise UsageError(
                    "a state with dampening or maximize cannot be loaded: SGD has neither"
                )
            _check({**self.defaults, **group})
        super().load_state_dict(state_dict)
        self._load_masters(state_dict)
        if self._on_device is not None:
            self._on_device.forget_units()
        if self._eager is not None:
            self._eager.adopt_momentum()

    def _load_masters(self, state_dict: dict[str, Any]) -> None:
        """torch has rounded them, and their momentum, to the parameters' dtype."""
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for key, param in zip(saved["params"], group["params"], strict=True):
                if self._dtype_of(param) == param.dtype:
                    self.state.get(param, {}).pop("master", None)
                    continue
                for name in ("master", "momentum_buffer"):
                    value = state_dict["state"].get(key, {}).get(name)
                    if value is not None:
                        self.state[param][name] = value.detach().to(
                            param.device, torch.float32, copy=True
                        )

    def state_dict(self) -> dict[str, Any]:
        """Of torch.optim.SGD's layout. Local. On a GPU it may wait for the device."""
        if self._on_device is not None:
            self._on_device.read_units(self.param_groups)
        return super().state_dict()

    def on_device(self, where: gpu.Gpu) -> DeviceSgd:
        """Its side on the GPU where the parameters lie. Private to the library."""
        if self._on_device is None or self._on_device.gpu is not where:
            self._on_device = DeviceSgd(where)
        return self._on_device

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's. Gradients that an eager update has consumed are zero already and stay where they are."""
        if self._eager is None or not self._eager.gradients_are_zero:
            super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters that have a gradient. With an eager aggregator they are already updated; this closes
        the iteration. ``closure``: re-evaluates the loss and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Attributes that GradScaler sets for the call; it does not bear them to exist otherwise.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self._eager is not None:
            if found_inf is not None:
                raise UsageError(
                    'GradScaler needs update="step": an eager update cannot be withheld'
                )
            self._eager.close_update()
        else:
            self._update_all(grad_scale, found_inf)
        return loss

    def _update_all(self, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> None:
        groups, side = self.param_groups, self._on_device
        if side and side.is_prepared(groups, self.state) and self._masters_follow(side.params):
            side.step(groups, self.state, grad_scale, found_inf)
            self._note_written(side.params)
            return
        params = [param for group in groups for param in group["params"] if param.grad is not None]
        places = {gpu.of(param) for param in params}
        if len(places) > 1:
            raise UsageError("the parameters of one SGD must lie on one device")
        if places == {None} and found_inf is not None and float(found_inf) != 0:
            return  # before anything is made; on a GPU, it alone knows
        gathered = [self._gather(group) for group in groups]  # checks first
        for where in places:  # none if no parameter has a gradient: momentum keeps its unit too
            if where is not None:
                side = self.on_device(where)
                side.prepare(groups, self.state, params, gathered)
                side.step(groups, self.state, grad_scale, found_inf)
                continue
            scale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
            for group, operands in zip(groups, gathered, strict=True):
                self._update(group, operands, scale)
        self._note_written(params)

    def _gather(self, group: dict[str, Any]) -> list[Operands]:
        """Of the group's parameters with a gradient: as the kernel reads them, and checked."""
        gathered: list[Operands] = []
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if grad.is_sparse or grad.dtype != param.dtype or grad.device != param.device:
                raise UsageError(
                    f"a gradient is {grad.layout}, {grad.dtype}, of a parameter that is {param.dtype} on "
                    f"{param.device}; both must be dense, of one dtype, on one device"
                )
            if not is_dense(param):
                raise UsageError("a parameter overlaps itself or has gaps; SGD needs dense memory")
            if grad.stride() != param.stride():
                grad = torch.empty_like(param).copy_(grad)
            gathered.append(self._operands(group, param, grad))
        return gathered

    def _operands(self, group: dict[str, Any], param: torch.Tensor, grad: torch.Tensor) -> Operands:
        momentum = self._momentum_buffer(param) if group["momentum"] else None
        if self._dtype_of(param) == param.dtype:
            return Operands(param, momentum, grad, None)
        return Operands(self._master_of(param), momentum, grad, param)

    def _update(self, group: dict[str, Any], gathered: list[Operands], scale: float) -> None:
        spans: dict[torch.dtype, list[tuple[int, int, int, int]]] = {}
        widened: list[torch.Tensor] = []  # alive until they are used
        for weight, momentum, grad, copy in gathered:
            if copy is not None:
                widened.append(grad := torch.empty_like(weight).copy_(grad))
            at = 0 if momentum is None else momentum.data_ptr()
            spans.setdefault(weight.dtype, []).append(
                (weight.data_ptr(), at, grad.data_ptr(), weight.numel())
            )
        for dtype, table in spans.items():
            _core.kernels.sgd_many(table, DTYPES[dtype].name, scalars_of(group), scale, False)
        for weight, _, _, copy in gathered:
            if copy is not None:
                copy.copy_(weight)
        if group["form"] == "absorbed":
            self._change_unit(group)

    def _change_unit(self, group: dict[str, Any]) -> None:
        """Of the momentum that this step has not touched; the kernel has changed the others'."""
        change = change_of_unit(group)
        group["momentum_lr"] = momentum_lr_of(group)
        if change == 1.0:
            return
        for param in group["params"]:
            # Who has looked for a state has made an empty one.
            if param.grad is None and "momentum_buffer" in self.state.get(param, {}):
                self.state[param]["momentum_buffer"].mul_(change)

    def _momentum_buffer(self, param: torch.Tensor) -> torch.Tensor:
        state = self.state[param]
        dtype = self._dtype_of(param)
        buffer: torch.Tensor | None = state.get("momentum_buffer")
        if buffer is not None and buffer.shape != param.shape:
            raise UsageError(
                f"a momentum buffer has shape {tuple(buffer.shape)}, its parameter {tuple(param.shape)}; "
                "was this state saved from another model?"
            )
        if (
            buffer is None
            or buffer.stride() != param.stride()
            or buffer.dtype != dtype
            or buffer.device != param.device
        ):
            fresh = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            buffer = state["momentum_buffer"] = fresh if buffer is None else fresh.copy_(buffer)
        return buffer

    def _dtype_of(self, param: torch.Tensor) -> torch.dtype:
        """In which its weights and momentum are kept."""
        return torch.float32 if self.master_weights and param.dtype in HALVES else param.dtype

    def _master_of(self, param: torch.Tensor) -> torch.Tensor:
        state = self.state[param]
        master: torch.Tensor | None = state.get("master")
        if master is not None and master.shape != param.shape:
            raise UsageError(
                f"a master has shape {tuple(master.shape)}, its parameter {tuple(param.shape)}; "
                "was this state saved from another model?"
            )
        if master is not None and self._written.get(param) == _mark_of(param):
            return master
        weight = param.detach()
        fresh = torch.empty_like(weight, dtype=torch.float32).copy_(weight)
        if master is not None:  # it knows more, where the parameter is still what it was rounded to
            known = master.to(weight.device)
            fresh.copy_(torch.where(known.to(weight.dtype) == weight, known, fresh))
        state["master"], self._written[param] = fresh, _mark_of(param)
        return fresh

    def _masters_follow(self, params: Sequence[torch.Tensor]) -> bool:
        return not self.master_weights or all(
            self._written.get(param) == _mark_of(param) for param in params
        )

    def _note_written(self, params: Sequence[torch.Tensor]) -> None:
        """For autograd, which must notice that saved weights change, and for their masters."""
        if params:
            increment_version(params)
        if self.master_weights:
            self._written.update((param, _mark_of(param)) for param in params)


def _mark_of(tensor: torch.Tensor) -> _Mark:
    """Changes with every write to it."""
    return tensor._version, tensor.data_ptr()


def _check(group: dict[str, Any]) -> None:
    for name in ("lr", "momentum", "weight_decay"):
        if not float(group[name]) >= 0:
            raise UsageError(f"{name} is {group[name]}; a number >= 0 is needed")
    if group["form"] not in FORMS:
        raise UsageError(f"form is {group['form']!r}; accepted are {', '.join(FORMS)}")
