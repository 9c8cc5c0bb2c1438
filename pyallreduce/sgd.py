"""Fused SGD with momentum correction: one pass over memory per parameter (paper, section 3, Remark 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch.autograd.graph import increment_version

from pyallreduce import _core, gpu
from pyallreduce._buffer import DTYPES, is_dense
from pyallreduce.errors import UsageError
from pyallreduce.sgd_device import DeviceSgd
from pyallreduce.sgd_rule import change_of_unit, momentum_lr_of, scalars_of

FORMS = ("reference", "absorbed")

_Triple = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]  # weights, momentum, gradient


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
    Honours ``grad_scale`` and ``found_inf`` as torch.amp.GradScaler sets them: an overflow changes neither weights nor
    momentum.

    On a GPU: one launch per dtype, and no wait for the device, with GradScaler neither. ``lr`` may be a float32 tensor
    there, which is read when the launch runs: a replayed CUDA graph follows it (capture after one step without).
    """

    _step_supports_amp_scaling = True
    # In the class: a copy or a pickle is attached to nothing.
    _eager: AttachedUpdate | None = None
    _on_device: DeviceSgd | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        nesterov: bool = True,
        form: str = "reference",
        correction: bool = True,
    ) -> None:
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
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
        if self._on_device is not None:
            self._on_device.forget_units()
        if self._eager is not None:
            self._eager.adopt_momentum()

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
        groups = self.param_groups
        params = [param for group in groups for param in group["params"] if param.grad is not None]
        places = {gpu.of(param) for param in params}
        if len(places) > 1:
            raise UsageError("the parameters of one SGD must lie on one device")
        if places == {None} and found_inf is not None and float(found_inf) != 0:
            return  # before anything is made; on a GPU, it alone knows
        gathered = [self._gather(group) for group in groups]  # checks first
        for where in places:  # none if no parameter has a gradient: momentum keeps its unit too
            if where is not None:
                self.on_device(where).step(groups, gathered, self.state, grad_scale, found_inf)
                increment_version(params)
                continue
            scale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
            for group, triples in zip(groups, gathered, strict=True):
                self._update(group, triples, scale)

    def _gather(self, group: dict[str, Any]) -> list[_Triple]:
        """The group's weights with a gradient: as the kernel reads them, and checked."""
        triples: list[_Triple] = []
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
            triples.append(
                (param, self._momentum_buffer(param) if group["momentum"] else None, grad)
            )
        return triples

    def _update(self, group: dict[str, Any], triples: list[_Triple], scale: float) -> None:
        spans: dict[torch.dtype, list[tuple[int, int, int, int]]] = {}
        for param, momentum, grad in triples:
            at = 0 if momentum is None else momentum.data_ptr()
            spans.setdefault(param.dtype, []).append(
                (param.data_ptr(), at, grad.data_ptr(), param.numel())
            )
        for dtype, table in spans.items():
            _core.kernels.sgd_many(table, DTYPES[dtype].name, scalars_of(group), scale, False)
        if triples:
            increment_version([param for param, _, _ in triples])
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
        buffer: torch.Tensor | None = state.get("momentum_buffer")
        if buffer is not None and buffer.shape != param.shape:
            raise UsageError(
                f"a momentum buffer has shape {tuple(buffer.shape)}, its parameter {tuple(param.shape)}; "
                "was this state saved from another model?"
            )
        if (
            buffer is None
            or buffer.stride() != param.stride()
            or buffer.dtype != param.dtype
            or buffer.device != param.device
        ):
            fresh = torch.zeros_like(param, memory_format=torch.preserve_format)
            buffer = state["momentum_buffer"] = fresh if buffer is None else fresh.copy_(buffer)
        return buffer


def _check(group: dict[str, Any]) -> None:
    for name in ("lr", "momentum", "weight_decay"):
        if not float(group[name]) >= 0:
            raise UsageError(f"{name} is {group[name]}; a number >= 0 is needed")
    if group["form"] not in FORMS:
        raise UsageError(f"form is {group['form']!r}; accepted are {', '.join(FORMS)}")
