"""Clipping by the global norm of the aggregated gradients, as torch.nn.utils.clip_grad_norm_ defines it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pyallreduce import _core
from pyallreduce._buffer import DTYPES
from pyallreduce.buckets import Bucket


def coefficient(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied by: 1 if they need no clipping."""
    return min(1.0, max_norm / (norm + 1e-6))


def norm_of(works: Sequence[_core.Work]) -> float:
    """The 2-norm over all buckets, equal on all ranks; inf or NaN if a gradient is. In double precision."""
    return math.sqrt(sum(work.findings()[0] for work in works))


def scale_gradients(buckets: Sequence[Bucket], factor: float) -> None:
    """Multiplies this rank's reduced gradients in place, rounding once."""
    if factor == 1.0:
        return
    for bucket in buckets:
        address = [bucket.flat.data_ptr()]
        _core.kernels.reduce(
            address, address, bucket.flags_begin, DTYPES[bucket.dtype].name, "avg", factor
        )
