"""What the operating system tells about another process: where its threads sleep, what it has left behind."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

_NUMBERS = {"x86_64": (202, 230), "aarch64": (98, 115)}
FUTEX, CLOCK_NANOSLEEP = _NUMBERS[platform.machine()]
FUTEX_WAIT = 0  # without the flag of a private one
_LISTEN = "0A"


def why_blind() -> str | None:
    """None if the kernel lets a process see where its children's threads sleep; else what is missing."""
    try:
        Path("/proc/self/task", str(os.getpid()), "syscall").read_text()
    except OSError as error:
        return f"/proc/PID/task/TID/syscall cannot be read: {error}"
    return None


def _system_calls(pid: int) -> dict[int, list[int]]:
    """By thread that is blocked in one: number and arguments."""
    calls = {}
    with suppress(FileNotFoundError, ProcessLookupError):
        for tid in map(int, os.listdir(f"/proc/{pid}/task")):
            with suppress(FileNotFoundError, ProcessLookupError):
                words = Path(f"/proc/{pid}/task/{tid}/syscall").read_text().split()
                if words and words[0].isdigit():
                    calls[tid] = [int(words[0]), *(int(word, 16) for word in words[1:7])]
    return calls


def waits_for_a_rank(pid: int) -> bool:
    """A thread sleeps on another rank's phase, and that phase is still what it was when it went to sleep. A futex that
    is not private is one of the core's: nothing else here waits on shared memory."""
    for number, address, operation, expected, *_ in _system_calls(pid).values():
        if number == FUTEX and operation == FUTEX_WAIT:
            with suppress(OSError), open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                return os.pread(memory.fileno(), 4, address) == expected.to_bytes(4, "little")
    return False


def is_trapped(pid: int) -> bool:
    """A thread sleeps in the trap (rank.py): only there does a rank use this system call."""
    return any(call[0] == CLOCK_NANOSLEEP for call in _system_calls(pid).values())


def main_thread_waits(pid: int) -> bool:
    """For another thread of its process: a condition, or that thread's end."""
    number, _, operation, *_ = _system_calls(pid).get(pid, [-1, 0, 0])
    return number == FUTEX and operation != FUTEX_WAIT


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for tid in os.listdir(f"/proc/{pid}/task"):
            with suppress(FileNotFoundError, ProcessLookupError):
                text = Path(f"/proc/{pid}/task/{tid}/children").read_text()
                found += map(int, text.split())
    return found


def is_listening(port: int) -> bool:
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == _LISTEN and int(local.rsplit(":", 1)[1], 16) == port:
                return True
    return False


def holdings() -> dict[str, int]:
    """What this process holds that a communicator must give back."""
    maps = Path("/proc/self/maps").read_text()
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": maps.count("memfd:pyallreduce"),
    }
