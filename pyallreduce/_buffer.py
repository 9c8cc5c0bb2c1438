"""Tensors as the core sees them: address, count, dtype. The only place that looks at ``data_ptr``."""

from __future__ import annotations

import zlib

import torch

from pyallreduce._core import DType, Op
from pyallreduce.errors import UsageError

DTYPES: dict[torch.dtype, DType] = {
    torch.float64: DType.float64,
    torch.float32: DType.float32,
    torch.bfloat16: DType.bfloat16,
    torch.float16: DType.float16,
    torch.int64: DType.int64,
    torch.int32: DType.int32,
    torch.uint8: DType.uint8,
}
OPS: dict[str, Op] = {"sum": Op.sum, "avg": Op.avg, "prod": Op.prod, "min": Op.min, "max": Op.max}


# Address, number of elements, dtype, layout: 0 for contiguous, else a hash of shape and strides, which must then agree
# between ranks.
Span = tuple[int, int, DType, int]

_STRIDED = torch.strided
_OP_OF = {
    (name, dtype): op
    for name, op in OPS.items()
    for dtype in DTYPES
    if dtype.is_floating_point or op is not Op.avg
}


def is_dense(tensor: torch.Tensor) -> bool:
    """True if the elements fill their memory without gap or overlap, in whatever order (channels_last too)."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def span_of(tensor: torch.Tensor, name: str = "tensor", *, contiguous: bool = False) -> Span:
    """The memory of a dense CPU or CUDA tensor. UsageError says what was given and what is accepted."""
    # The common case first: these looks at the tensor are most of what a small collective costs in Python.
    if (
        isinstance(tensor, torch.Tensor)
        and tensor.is_cpu
        and tensor.layout is _STRIDED
        and tensor.is_contiguous()
        and (dtype := DTYPES.get(tensor.dtype)) is not None
    ):
        return (tensor.data_ptr(), tensor.numel(), dtype, 0)
    return _unusual_span_of(tensor, name, contiguous)


def _unusual_span_of(tensor: torch.Tensor, name: str, contiguous: bool) -> Span:
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(f"{name} is a {type(tensor).__name__}; a torch.Tensor is needed")
    if tensor.device.type not in ("cpu", "cuda"):
        raise UsageError(
            f"{name} is on {tensor.device}; communicators work on CPU and CUDA tensors. Copy it with .cpu()"
        )
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        accepted = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise UsageError(f"{name} has dtype {tensor.dtype}; accepted are {accepted}")
    if tensor.layout is not _STRIDED:
        raise UsageError(f"{name} has layout {tensor.layout}; make it dense with .to_dense()")
    shape, strides = tuple(tensor.shape), tensor.stride()
    if contiguous or not is_dense(tensor):
        raise UsageError(
            f"{name} with shape {shape} and strides {strides} "
            f"{'is not contiguous' if contiguous else 'overlaps itself or has gaps'}; "
            "pass .contiguous() of it"
        )
    layout = zlib.crc32(repr((shape, strides)).encode()) | 1
    return (tensor.data_ptr(), tensor.numel(), dtype, layout)


def op_of(op: str, dtype: torch.dtype) -> Op:
    """The core's operation. UsageError for an unknown one and for the average of integers."""
    try:
        return _OP_OF[op, dtype]
    except (KeyError, TypeError):  # TypeError: not hashable
        if op == "avg":
            raise UsageError(f"op 'avg' of {dtype} would round; use 'sum' and divide") from None
        raise UsageError(f"op is {op!r}; accepted are {', '.join(OPS)}") from None


def check_disjoint(output: torch.Tensor, input: torch.Tensor) -> None:
    begin, end = output.data_ptr(), output.data_ptr() + output.nbytes
    other_begin, other_end = input.data_ptr(), input.data_ptr() + input.nbytes
    if begin < other_end and other_begin < end:
        raise UsageError("output and input overlap in memory; pass separate tensors")
