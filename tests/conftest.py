"""Every test has a deadline: past it the stacks of all threads are printed and the run ends."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator

import pytest

DEADLINE_S = 120.0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "deadline(seconds): another deadline than the default")


@pytest.fixture(autouse=True)
def deadline(request: pytest.FixtureRequest) -> Iterator[None]:
    marker = request.node.get_closest_marker("deadline")
    seconds = marker.args[0] if marker else DEADLINE_S
    # A copy of the real stderr: pytest has redirected descriptor 2.
    faulthandler.dump_traceback_later(seconds, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
