"""Layer-wise, overlapped gradient all-reduce for synchronous data-parallel SGD.

The public names are those in ``__all__``. They load lazily, so that ``par.schedules`` works without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pyallreduce import schedules
from pyallreduce._core import __version__
from pyallreduce.errors import Error, MismatchError, PeerError, TimeoutError, UsageError

if TYPE_CHECKING:
    from pyallreduce.aggregator import GradientAggregator
    from pyallreduce.communicator import Communicator, Work, init
    from pyallreduce.ddp_hooks import allreduce_hook, bf16_compress_hook, fp16_compress_hook
    from pyallreduce.sgd import SGD

_LAZY = {
    "GradientAggregator": "aggregator",
    "Communicator": "communicator",
    "Work": "communicator",
    "init": "communicator",
    "allreduce_hook": "ddp_hooks",
    "bf16_compress_hook": "ddp_hooks",
    "fp16_compress_hook": "ddp_hooks",
    "SGD": "sgd",
}

__all__ = [
    "SGD",
    "Communicator",
    "Error",
    "GradientAggregator",
    "MismatchError",
    "PeerError",
    "TimeoutError",
    "UsageError",
    "Work",
    "__version__",
    "allreduce_hook",
    "bf16_compress_hook",
    "fp16_compress_hook",
    "init",
    "schedules",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pyallreduce' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pyallreduce.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
