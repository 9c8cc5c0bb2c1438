"""SIGTERM and SIGUSR1 ask a run to save and end; so does the end of the torchrun that started it.

A signal reaches the ranks at different moments, some or all of them; so the handler only notes it,
and what to do is agreed between the ranks (watch.py).
"""

from __future__ import annotations

import os
import signal
from types import FrameType

REQUESTS = (signal.SIGTERM, signal.SIGUSR1)
# What a process gets whose terminal is gone: nobody sends it here, its number stands for the case.
ABANDONED = signal.SIGHUP
_received = 0
_parent: int | None = None


def listen(needs_parent: bool = False) -> None:
    """From now on, note the requests. Main thread only.

    With `needs_parent` the end of the present parent is one: torchrun dies of signals that it does
    not handle, SIGUSR1 among them, and leaves its ranks behind.
    """
    global _parent
    _parent = os.getppid() if needs_parent else None
    for number in REQUESTS:
        signal.signal(number, _note)


def received() -> int:
    """The number of the last request that this process has got; 0 for none."""
    if not _received and _parent not in (None, os.getppid()):
        return ABANDONED
    return _received


def name(number: int) -> str:
    """Of a request, for people."""
    return "the end of torchrun" if number == ABANDONED else signal.Signals(number).name


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    _received = number
