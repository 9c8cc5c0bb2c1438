"""A run as its directory tells it: all that pictures, reports and comparisons know of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from pyallreduce import UsageError
from train.metrics import METRICS, read_metrics
from train.recipe import Schedule, median_error

CONFIG, ENVIRONMENT, TIMELINE = "config.json", "env.json", "timeline.json"


@dataclasses.dataclass(frozen=True)
class Records:
    """What config.json, env.json, metrics.jsonl and timeline.json of `path` hold.

    `timeline` is a report of the aggregator, or None in a run that was killed.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    timeline: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> Records:
        """UsageError when `path` is not a run directory of this version."""
        try:
            config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
            environment = json.loads((path / ENVIRONMENT).read_text(encoding="utf-8"))
            timeline = path / TIMELINE
            found = json.loads(timeline.read_text(encoding="utf-8")) if timeline.exists() else None
            run = cls(path, config, environment, read_metrics(path / METRICS), found)
            run.rate(0)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path} is not a run directory of this version of the trainer "
                f"({type(error).__name__}: {error}); give one, such as runs/digits"
            ) from None
        return run

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def derived(self) -> dict[str, Any]:
        """What the configuration became with this data and so many processes."""
        return self.config["derived"]

    @property
    def per_epoch(self) -> int:
        """Iterations per epoch."""
        return self.derived["iterations_per_epoch"]

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The records of log lines."""
        return [r for r in self.metrics if r["kind"] == "step"]

    @cached_property
    def epochs(self) -> list[dict[str, Any]]:
        """An epoch that was stopped inside and resumed counts with its last record."""
        return list({r["epoch"]: r for r in self.metrics if r["kind"] == "epoch"}.values())

    @property
    def measured(self) -> list[dict[str, Any]]:
        """Epochs with speeds: a process that resumes may have only the evaluation left to do."""
        return [r for r in self.epochs if "per_rank" in r]

    @property
    def step(self) -> int:
        """The last iteration of which there is a record."""
        return max((r["step"] for r in self.metrics), default=0)

    @property
    def summary(self) -> dict[str, Any] | None:
        """That of a run which came to its end."""
        return self._last_of_kind("summary")

    @property
    def total(self) -> int:
        """Iterations of the whole recipe."""
        return self.derived["schedule"]["total"]

    @property
    def is_whole(self) -> bool:
        """Whether all epochs of the recipe are there."""
        return bool(self.epochs) and self.epochs[-1]["step"] == self.total

    @property
    def status(self) -> str:
        """One line: whether it came to its end, and otherwise why not, as far as is known."""
        at = f"at iteration {self.step:,} of {self.total:,}"
        if self.is_whole and self.summary:
            return f"finished all {self.config['epochs']} epochs"
        if self.summary:
            return f"ended as asked for, {at}"
        if stopped := self._last_of_kind("stopped"):
            return f"stopped early {at}: {stopped['reason']}"
        return f"running, or killed: {at}"

    @property
    def errors(self) -> list[float]:
        """Held-out error in percent by epoch."""
        return [r["test_error"] for r in self.epochs]

    @property
    def error(self) -> float | None:
        """The run's: the median over its last five epochs."""
        return median_error(self.errors) if self.errors else None

    @cached_property
    def rate(self) -> Callable[[int], float]:
        """The learning rate of iteration t."""
        fields = self.derived["schedule"]
        return Schedule(**{**fields, "drops": tuple(fields["drops"])})

    @property
    def caption(self) -> str:
        """What a picture needs to be understood alone: command, ranks, machine."""
        env = self.environment
        ranks = f"{env['ranks']} rank{'s' * (env['ranks'] != 1)}"
        cores = f"{env['cores']} core{'s' * (env['cores'] != 1)}"
        return f"{env['command']}   ({ranks}, {cores}, {env['cpu']})"

    def _last_of_kind(self, kind: str) -> dict[str, Any] | None:
        """The newest record, if it is of that kind: what follows it has made it out of date."""
        last = self.metrics[-1] if self.metrics else {"kind": None}
        return last if last["kind"] == kind else None
