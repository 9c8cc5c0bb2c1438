"""SIGTERM and SIGUSR1 ask a run to save and end.

A signal reaches the ranks at different moments, some or all of them; so the handler only notes it,
and what to do is agreed between the ranks (watch.py).
"""

from __future__ import annotations

import signal
from types import FrameType

REQUESTS = (signal.SIGTERM, signal.SIGUSR1)
_received = 0


def listen() -> None:
    """From now on, note the requests. Main thread only."""
    for number in REQUESTS:
        signal.signal(number, _note)


def received() -> int:
    """The number of the last request that this process has got; 0 for none."""
    return _received


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    _received = number
