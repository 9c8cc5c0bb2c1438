"""`--profile`: a few iterations of rank 0 under torch.profiler, for ui.perfetto.dev.

The library's own record (timeline.png, `pyallreduce trace`) is always there and knows the buckets;
this one knows every operator and kernel, and slows down what it traces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from torch.profiler import profile

# First iterations allocate and start threads: the traced ones come later, if the run is long enough.
SKIPPED = 10

T = TypeVar("T")


def to_trace(count: int | None, step: int, last: int) -> range:
    """Which iterations, counted from 0, of a process that runs those from `step` up to `last`."""
    first = max(step, min(step + SKIPPED, last - (count or 0)))
    return range(first, min(first + (count or 0), last))


def traced(iterations: Iterable[T], step: int, chosen: range, run: Path) -> Iterator[T]:
    """The iterations, of which the first has the number `step`; the `chosen` ones leave a trace.

    In the run directory, under torchtitan's names. What lies between epochs is in no trace: one that
    an epoch's end cuts short is shorter.
    """
    with ExitStack() as trace:
        for number, iteration in enumerate(iterations, step):
            if chosen and number == chosen.start:
                trace.enter_context(_trace(trace_file(run, number)))
            yield iteration
            if number + 1 == chosen.stop:
                trace.close()


def trace_file(run: Path, iteration: int) -> Path:
    """That of the trace which begins with this iteration, counted from 0."""
    return run / "profiling" / "traces" / f"iteration_{iteration + 1}" / "rank0_trace.json.gz"


def _trace(file: Path) -> profile:
    file.parent.mkdir(parents=True, exist_ok=True)
    return profile(on_trace_ready=lambda done: done.export_chrome_trace(str(file)))
