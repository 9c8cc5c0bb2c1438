"""What the programs of `make gpu-check` have in common: they print one JSON object per line, the moment it is known."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

SKIPPED = 77  # exit code: cannot run in this place, the last row says why (automake's convention)
LIMIT = "GPU_CHECK_LIMIT_S"  # variable: seconds that gpu-check gives the program
_start = time.monotonic()


def search_path() -> str:
    """PATH; then this Python's programs, which may be an environment's wheels, and where CUDA's toolkit usually is."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [str(Path(sys.executable).parent), *(f"{home}/bin" for home in homes if home)]
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *folders])


def seconds_left() -> float:
    """Until gpu-check ends this program; a minute from its start where nobody set a limit."""
    return _start + float(os.environ.get(LIMIT, "60")) - time.monotonic()


def emit(**row: Any) -> None:
    """In one write, so that no other process's output falls into the middle of a line."""
    print(json.dumps(row), flush=True)


def skip(why: str) -> NoReturn:
    emit(says=why)
    sys.exit(SKIPPED)


def row_of(line: str) -> dict[str, Any] | None:
    """The row that this line of output is, if it is one."""
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line, parse_constant=str)  # NaN and Infinity are no JSON
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def die_with_parent() -> None:
    """In a new process, between fork and exec: it ends when its parent does, also when that is killed."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
