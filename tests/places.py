"""Places where ranks may have to live: system calls refused, other namespaces, little room.

Each function changes the calling process for good: a rank calls it before it uses pyallreduce.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import signal
from pathlib import Path

import pytest

from ranks import run_ranks

_libc = ctypes.CDLL(None, use_errno=True)

NEW_MOUNTS, NEW_PIDS, NEW_NETWORK = (
    0x00020000,
    0x20000000,
    0x40000000,
)  # CLONE_NEWNS, ...PID, ...NET
_NEW_USERS = 0x10000000
_NAMES = {NEW_MOUNTS: "mount", NEW_PIDS: "pid", NEW_NETWORK: "network"}


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


# --- system calls refused --------------------------------------------------------------------------------------------

_SYSTEM_CALLS = {
    "x86_64": {"memfd_create": 319, "pidfd_open": 434, "mmap": 9},
    "aarch64": {"memfd_create": 279, "pidfd_open": 434, "mmap": 222},
}
SHARED = (3, 0x01)  # of mmap: argument 3 has MAP_SHARED


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def require_seccomp() -> None:
    if platform.machine() not in _SYSTEM_CALLS:
        pytest.skip(f"numbers of system calls are not known here for {platform.machine()}")
    if not Path("/proc/sys/kernel/seccomp").exists():
        pytest.skip("this kernel has no seccomp filters")


def refuse(call: str, error: int, only: tuple[int, int] | None = None) -> None:
    """From now on ``call`` fails with ``error``; ``only``: where that argument has that bit."""
    load, equal, has_bit, give = 0x20, 0x15, 0x45, 0x06  # BPF_LD|W|ABS, JMP|JEQ|K, JMP|JSET|K, RET
    number_at, arguments_at = 0, 16  # in struct seccomp_data; little-endian: the low half is first
    errno_of, allow = 0x00050000, 0x7FFF0000
    number = _SYSTEM_CALLS[platform.machine()][call]
    condition = (
        [] if only is None else [(load, 0, 0, arguments_at + 8 * only[0]), (has_bit, 0, 1, only[1])]
    )
    listing = [
        (load, 0, 0, number_at),
        (equal, 0, 1 + len(condition), number),
        *condition,
        (give, 0, 0, errno_of | error),
        (give, 0, 0, allow),
    ]
    instructions = (_Instruction * len(listing))(*listing)
    program = _Program(len(listing), instructions)
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    _check(_libc.prctl(no_new_privileges, 1, 0, 0, 0), "prctl")
    _check(_libc.prctl(set_seccomp, filter_mode, ctypes.byref(program), 0, 0), "seccomp")


# --- namespaces ------------------------------------------------------------------------------------------------------


def enter(namespaces: int) -> None:
    """New namespaces for this process (of pids: for its children), as an unprivileged user would make them."""
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(_NEW_USERS | namespaces) == 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    else:  # user namespaces may be forbidden, also to root
        _check(_libc.unshare(namespaces), "unshare")
    if namespaces & NEW_MOUNTS:
        private_below = (
            0x4000 | 0x40000
        )  # MS_REC | MS_PRIVATE: what we mount is seen by nobody else
        _check(_libc.mount(None, b"/", None, private_below, None), "mount")


def mount_tmpfs(path: str, size: str) -> None:
    _check(_libc.mount(b"tmpfs", path.encode(), b"tmpfs", 0, f"size={size}".encode()), "mount")


def enter_pid_namespace() -> None:
    """The rank's life goes on in the second process of a new pid namespace (the first gets no signals of its own);
    the caller, and that first, wait for it and end as it does."""
    enter(NEW_PIDS)
    for _ in range(2):
        pid = os.fork()
        if pid != 0:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os._exit(code if code >= 0 else 128 - code)
        set_parent_death_signal = 1
        _check(_libc.prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0), "prctl")


def _try(rank: int, n: int, namespaces: int) -> str:
    try:
        enter(namespaces)
    except OSError as error:
        return error.strerror
    return ""


@functools.cache
def _why_not(namespaces: int) -> str:
    return run_ranks(1, _try, namespaces)[0]


def require(namespaces: int) -> None:
    if problem := _why_not(namespaces):
        kinds = " and ".join(name for flag, name in _NAMES.items() if namespaces & flag)
        pytest.skip(f"this user or container may not make {kinds} namespaces: {problem}")
