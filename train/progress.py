"""What a person watches: a bar on a terminal, plain lines elsewhere, silence but on rank 0."""

from __future__ import annotations

import os
import sys
from typing import Any, Protocol, TextIO


class Progress(Protocol):
    def line(self, text: str) -> None: ...
    def advance(self, step: int, text: str = "") -> None: ...
    def close(self) -> None: ...


class Silent:
    """Ranks other than 0."""

    def line(self, text: str) -> None:
        pass

    def advance(self, step: int, text: str = "") -> None:
        pass

    def close(self) -> None:
        pass


class Lines(Silent):
    """Files, pipes and dumb terminals: nothing is ever redrawn."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def advance(self, step: int, text: str = "") -> None:
        if text:
            self.line(text)


class Kept:
    """All lines also into a file, which is the caller's."""

    def __init__(self, shown: Progress, file: TextIO) -> None:
        self._shown = shown
        self._lines = Lines(file)

    def line(self, text: str) -> None:
        self._shown.line(text)
        self._lines.line(text)

    def advance(self, step: int, text: str = "") -> None:
        self._shown.advance(step, text)
        self._lines.advance(step, text)

    def close(self) -> None:
        self._shown.close()


class Bar:
    """A terminal: one bar over the whole run, the newest numbers beside it, lines above it."""

    def __init__(self, stream: TextIO, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        # rich itself honours NO_COLOR.
        self._bar = RichProgress(
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(file=stream),
        )
        self._task = self._bar.add_task("", total=total)
        self._bar.start()

    def line(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: int, text: str = "") -> None:
        self._bar.update(self._task, completed=step, description=text or None)

    def close(self) -> None:
        self._bar.stop()


def make_progress(rank: int, total: int, stream: TextIO = sys.stdout) -> Progress:
    """The right one of the three for this rank and stream."""
    if rank != 0:
        return Silent()
    if not stream.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return Lines(stream)
    try:
        return Bar(stream, total)
    except ImportError:  # rich is an extra
        return Lines(stream)


def log_line(
    epoch: int, epochs: int, step: int, steps: int, lr: float, eta_s: float, numbers: dict[str, Any]
) -> str:
    """One line per --print-freq iterations; epoch and step count from 1."""
    n = numbers
    return (
        f"epoch {epoch}/{epochs} [{step:>{len(str(steps))}}/{steps}]  "
        f"loss {n['loss']:.3f} ({n['loss_mean']:.3f})  lr {lr:.4g}  "
        f"{n['images_per_s']:,.0f} img/s (compute {n['compute_images_per_s']:,.0f})  "
        f"data {n['data_wait_percent']:.1f}%  comm-exposed {n['comm_exposed_percent']:.1f}%  "
        f"mem {n['peak_memory_gib']:.1f} GiB  eta {clock(eta_s)}"
    )


def clock(seconds: float) -> str:
    """Hours, minutes and seconds as 3:12:40 or 0:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
