"""The family of errors, raised by the core and by Python alike."""

from __future__ import annotations

import builtins
from collections.abc import Iterable
from typing import Any


class Error(RuntimeError):
    """Root of the family; itself raised when the operating system refuses something (memory, descriptors).

    ``peers``: sorted tuple of the global ranks concerned; ``peer``: the first of them, or None.
    Every error but UsageError poisons the communicator: later calls raise the first cause again.
    """

    def __init__(self, message: str, peers: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.peers: tuple[int, ...] = tuple(sorted(peers))

    @property
    def peer(self) -> int | None:
        return self.peers[0] if self.peers else None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.peers)


class PeerError(Error):
    """``peers`` died: their process ended, or they closed the communicator while they were needed."""


class TimeoutError(Error, builtins.TimeoutError):
    """``peers`` had not arrived when the time was over."""


class MismatchError(Error):
    """``peers`` called something else than the majority (in a tie: than rank 0)."""


class UsageError(Error, ValueError):
    """The caller's mistake, found before anything was sent. The communicator stays usable."""
