"""A plugin of pytest (``-p benchmarks.gpu.outcomes``): one row per test as it ends, and their counts."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from benchmarks.gpu.program import SKIPPED


class Outcomes:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._counts: Counter[str] = Counter()

    def _print(self, text: str) -> None:
        """On a line of its own in pytest's report, where capturing does not reach. The reporter's ensure_newline()
        does not know of dots that -q has printed."""
        self._config.pluginmanager.get_plugin("terminalreporter").write_line(f"\n{text}")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(report.nodeid, "cannot be collected", report.longreprtext[-500:])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return  # fixtures speak only of what went wrong
        why = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            why = report.longrepr[2]
        elif report.failed:
            why = report.longreprtext[-500:]
        self._add(report.nodeid, report.outcome, why, seconds=round(report.duration, 3))

    def _add(self, test: str, outcome: str, why: str, **more: Any) -> None:
        self._counts[outcome] += 1
        self._print(json.dumps({"test": test, "outcome": outcome, "why": why, **more}))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        words = ", ".join(f"{number} {outcome}" for outcome, number in self._counts.items())
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            words = "none of these tests is marked gpu"
            session.exitstatus = SKIPPED
        self._print(json.dumps({"tests": self._counts, "says": words}))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(config), "outcomes")
