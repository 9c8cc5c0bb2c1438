"""Where and in what numbers the network computes: device, precision, memory format, compiler."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

import pyallreduce as par
from train.config import Config

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(wanted: str, comm: par.Communicator) -> torch.device:
    """Collective: the same kind of device on every rank, on a GPU each rank of a host one of its own.

    "auto" takes GPUs where every rank has one and the library reduces its tensors. UsageError for
    "cuda" where they are missing.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    missing = torch.tensor([max(0, comm.local_size - torch.cuda.device_count())])
    comm.all_reduce(missing, op="max")
    if missing.item():
        if wanted == "auto":
            return torch.device("cpu")
        raise par.UsageError(
            f"--device: given cuda, but a host has {missing.item()} GPUs fewer than processes; "
            "accepted: one GPU per process; start fewer processes there or give --device cpu"
        )
    device = torch.device("cuda", comm.local_rank)
    torch.cuda.set_device(device)
    if wanted == "auto" and not _reduces_tensors_of(device, comm):
        return torch.device("cpu")
    return device


def _reduces_tensors_of(device: torch.device, comm: par.Communicator) -> bool:
    try:
        comm.broadcast(torch.zeros(1, device=device))
    except par.UsageError:  # raised before anything is sent: the communicator stays usable
        return False
    return True


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
