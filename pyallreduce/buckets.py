"""Buckets: flat symmetric buffers of whole parameters, and the views of gradients and weights into them."""

from __future__ import annotations

import bisect
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pyallreduce._buffer import is_dense
from pyallreduce.errors import UsageError
from pyallreduce.report import Time

DEFAULT_BUCKET_BYTES = 25 << 20  # as DDP
ALIGN_BYTES = 64  # every parameter begins on a cache line of its own


@dataclass(eq=False)
class Slot:
    """One parameter and its place in a bucket."""

    name: str
    param: torch.nn.Parameter
    begin: int  # in elements of the bucket
    grad: torch.Tensor = field(init=False)  # view of the bucket, with the parameter's strides
    address: int = field(init=False)  # of that view
    bucket: Bucket = field(init=False)
    index: int = field(init=False)  # in bucket.slots, and of its flag
    ready: bool = False  # in this backward
    used: bool = False  # has had a gradient since the last synchronisation

    def adopt_gradient(self) -> None:
        """Moves a gradient of other memory into the bucket: a fresh one after zero_grad(set_to_none=True), that of
        backward(create_graph=True), or one that the user has put there."""
        grad = self.param.grad
        if self.grad.data_ptr() != self.address:  # the user has set p.grad.data
            self.grad = view_of(self.bucket.flat, self)
        if grad is None or grad is self.grad:
            return
        if grad.layout is not torch.strided:
            raise UsageError(
                f"the gradient of {self.name} is {grad.layout}; only dense ones can be aggregated (sparse=False)"
            )
        with torch.no_grad():
            self.grad.copy_(grad)
        self.param.grad = self.grad


class Bucket:
    """``flat`` holds the parameters' gradients, then one flag per parameter: non-zero where a rank has used it.

    The flags ride in the buffer that is reduced anyway, so that all ranks know, without another collective, which
    parameters were used somewhere.
    """

    def __init__(self, index: int, slots: list[Slot], dtype: torch.dtype) -> None:
        self.index, self.slots, self.dtype = index, slots, dtype
        self.flags_begin = max(_end_of(slots[-1]), 1)  # not empty, so that it has a place in memory
        self.pending = len(slots)  # parameters without a gradient in this backward
        self.ready_s: Time = 0.0  # when the last gradient came
        self.flat: torch.Tensor
        self.flags: torch.Tensor
        for i, slot in enumerate(slots):
            slot.bucket, slot.index = self, i

    @property
    def span_of_names(self) -> str:
        names = [self.slots[0].name, self.slots[-1].name]
        return " to ".join(dict.fromkeys(names))

    @property
    def nbytes(self) -> int:
        return self.flat.nbytes

    def allocate(self, memory: Callable[[int, torch.dtype], torch.Tensor]) -> None:
        """Collective if ``memory`` is. All zero afterwards."""
        self.flat = memory(self.flags_begin + len(self.slots), self.dtype).zero_()
        self.flags = self.flat[self.flags_begin :]
        for slot in self.slots:
            slot.grad = view_of(self.flat, slot)
            slot.address = slot.grad.data_ptr()

    def slot_at(self, element: int) -> Slot:
        """The parameter that ``flat[element]`` belongs to."""
        return self.slots[bisect.bisect(self.slots, element, key=lambda slot: slot.begin) - 1]

    def announce_use(self) -> None:
        """Writes this rank's flags, and zeros where it has nothing to contribute.

        A gradient counts as used although this backward has not touched it if it is not zero: it was accumulated
        before. Mere zeros are what zero_grad(set_to_none=False) has left. Nobody waits for what a GPU has to tell.
        """
        self.flags.fill_(1)
        for slot in self.slots:
            slot.adopt_gradient()
            if slot.param.grad is None:  # perhaps the user has dropped it
                slot.used = False
                slot.grad.zero_()
            if not slot.used:
                self.flags[slot.index].copy_(slot.grad.any())

    def reset(self) -> None:
        """For the next iteration."""
        self.pending = len(self.slots)
        for slot in self.slots:
            slot.ready = slot.used = False

    def settle_unused(self) -> None:
        """After the reduction: used somewhere, the gradient is the aggregate; used nowhere, there is none. Waits for
        the device if this rank has left a parameter out."""
        if all(slot.used for slot in self.slots):
            return
        for slot, used_somewhere in zip(self.slots, self.flags.tolist(), strict=True):
            slot.param.grad = slot.grad if used_somewhere else None


def view_of(flat: torch.Tensor, slot: Slot) -> torch.Tensor:
    """The parameter's place in ``flat``, in the parameter's own memory format (channels_last too)."""
    param = slot.param
    if is_dense(param):
        return flat.as_strided(param.shape, param.stride(), slot.begin)
    return flat[slot.begin : slot.begin + param.numel()].view(param.shape)


def make_buckets(module: torch.nn.Module, bucket_bytes: int) -> list[Bucket]:
    """Trainable parameters in reverse order of registration, which is roughly the order of their gradients, packed per
    dtype. A bucket closes before it would exceed ``bucket_bytes``; a larger parameter has one of its own."""
    open_slots: dict[torch.dtype, list[Slot]] = {}
    closed: list[list[Slot]] = []
    for name, param in reversed(list(module.named_parameters())):
        if not param.requires_grad:
            continue
        slots = open_slots.setdefault(param.dtype, [])
        begin = _end_of(slots[-1]) if slots else 0
        if slots and (begin + param.numel()) * param.itemsize > bucket_bytes:
            closed.append(slots)
            slots = open_slots[param.dtype] = []
            begin = 0
        slots.append(Slot(name, param, begin))
    closed.extend(slots for slots in open_slots.values() if slots)
    order = {param: i for i, param in enumerate(reversed(list(module.parameters())))}
    closed.sort(
        key=lambda slots: order[slots[-1].param]
    )  # a bucket is complete with its last parameter
    return [Bucket(i, slots, slots[0].param.dtype) for i, slots in enumerate(closed)]


def layout_lines(
    module: torch.nn.Module, buckets: list[Bucket], options: dict[str, Any]
) -> list[str]:
    """Equal on two ranks if and only if their options, parameters, buffers and buckets are; for people to read."""
    return [
        *(f"{name}={value!r}" for name, value in options.items()),
        *(f"parameter {name} ({_form_of(p)})" for name, p in module.named_parameters()),
        "no more parameters",
        *(f"buffer {name} ({_form_of(b)})" for name, b in module.named_buffers()),
        "no more buffers",
        *(
            f"parameter {slot.name} at element {slot.begin} of bucket {bucket.index}"
            for bucket in buckets
            for slot in bucket.slots
        ),
    ]


def _form_of(tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    trained = "trained" if tensor.requires_grad else "not trained"
    return f"{dtype}, shape {tuple(tensor.shape)}, strides {tensor.stride()}, {trained}"


def layout_hash(lines: list[str]) -> int:
    text = "\n".join(lines).encode()
    return (zlib.crc32(text) << 32 | zlib.adler32(text)) or 1


def _end_of(slot: Slot) -> int:
    """First element after the slot at which another may begin."""
    line = ALIGN_BYTES // slot.param.itemsize
    return (slot.begin + slot.param.numel() + line - 1) // line * line
