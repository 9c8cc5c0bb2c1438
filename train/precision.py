"""Where and in what numbers the network computes: device, precision, memory format, compiler."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor, nn

import pyallreduce as par
from train.config import Config
from train.data.agree import on_every_rank

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(wanted: str, comm: par.Communicator) -> torch.device:
    """Collective: the same kind of device on every rank, on a GPU each rank of a host one of its own.

    "auto" takes GPUs where every rank has one and the library can work on it, and says why not where
    there are GPUs. UsageError on every rank for "cuda" where they are missing.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    try:
        return on_every_rank(comm, lambda: _own_gpu(comm)).device
    except par.UsageError as error:
        if wanted == "cuda":
            raise
        if torch.cuda.device_count() and comm.rank == 0:
            print(f"warning: the GPUs are left alone: {error}", file=sys.stderr)
        return torch.device("cpu")


class _Gpu(NamedTuple):
    device: torch.device
    fingerprint: str = "a GPU"  # which one differs between ranks


def _own_gpu(comm: par.Communicator) -> _Gpu:
    """This rank's, made torch's current one. Local; UsageError when the trainer cannot use it."""
    found = torch.cuda.device_count()
    if found < comm.local_size:
        raise par.UsageError(
            f"--device: a host has {found} GPUs for {comm.local_size} processes; accepted: one GPU per "
            "process; start fewer processes there or give --device cpu"
        )
    device = torch.device("cuda", comm.local_rank)
    torch.cuda.set_device(device)
    try:
        _try_library_on(device)
    except par.Error as error:
        raise par.UsageError(
            f"--device: the library cannot work on {device} ({error}); accepted: an installation with "
            "CUDA kernels, and NCCL; see pyallreduce doctor, or give --device cpu"
        ) from None
    return _Gpu(device)


def _try_library_on(device: torch.device) -> None:
    """One update and one reduction by this process alone: its kernels and NCCL. Error: one is missing."""
    weight = nn.Parameter(torch.zeros(1, device=device))
    weight.grad = torch.zeros_like(weight)
    par.SGD([weight], lr=0.0).step()
    with closing(par.init(store=torch.distributed.HashStore(), rank=0, size=1)) as alone:
        alone.all_reduce(weight.grad)


class Precision:
    """How a run computes, from its flags; on the CPU and on a GPU alike."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self.device, self._name = device, cfg.precision
        self._dtype = AUTOCAST.get(cfg.precision)
        wants_nhwc = device.type == "cuda" if cfg.channels_last is None else cfg.channels_last
        self.memory_format = torch.channels_last if wants_nhwc else torch.contiguous_format
        # Small gradients vanish in fp16 but not in bf16, which has the exponents of float32.
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
        self._compiles = cfg.compile
        short = cfg.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = short
        torch.backends.cudnn.allow_tf32 = short

    def __str__(self) -> str:
        format_name = str(self.memory_format).removeprefix("torch.")
        compiled = ", compiled" if self._compiles else ""
        return f"{self._name} on {self.device}, {format_name}{compiled}"

    def autocast(self) -> torch.autocast:
        """Around a forward pass: its result may be of 16 bits, the weights stay of 32."""
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None)

    def place(self, model: nn.Module) -> nn.Module:
        return model.to(self.device).to(memory_format=self.memory_format)

    def arranged(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches with their images in the network's memory format."""
        for images, labels in batches:
            yield images.contiguous(memory_format=self.memory_format), labels

    def compile(self, model: nn.Module) -> None:
        """Only `forward`: the hooks of the aggregator stay outside, as ordinary Python."""
        if self._compiles:
            model.forward = torch.compile(model.forward)


def wide(logits: Tensor) -> Tensor:
    """Of at least 32 bits: in 16, the loss of a batch would have three digits."""
    return logits.float() if logits.itemsize < 4 else logits
