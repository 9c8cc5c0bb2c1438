"""Every test has a deadline: past it the stacks of all threads are printed and the run ends. Tests marked ``gpu`` need
one: without, they are skipped loudly, or fail with ``--gpu=require`` (benchmarks/gpu/check.py)."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
import torch

DEADLINE_S = 120.0
_stderr = pytest.StashKey[TextIO]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu", choices=["skip", "require"], default="skip", help="where there is no GPU"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "deadline(seconds): another deadline than the default")
    config.addinivalue_line(
        "markers", "gpu: needs a GPU; `make gpu-check` runs these where there is one"
    )
    # The real stderr: while a test runs, descriptor 2 is a file that dies with the process.
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        config.stash[_stderr] = os.fdopen(os.dup(2), "w")


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_stderr].close()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    why = "torch sees no GPU; `make gpu-check` runs this where there is one"
    if item.config.getoption("gpu") == "require":
        pytest.fail(why, pytrace=False)
    pytest.skip(why)


@pytest.fixture(autouse=True)
def deadline(request: pytest.FixtureRequest) -> Iterator[None]:
    marker = request.node.get_closest_marker("deadline")
    seconds = marker.args[0] if marker else DEADLINE_S
    faulthandler.dump_traceback_later(seconds, exit=True, file=request.config.stash[_stderr])
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def mocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the libraries that stand for NCCL and the CUDA runtime."""
    from mocked import build_mocks

    return build_mocks(tmp_path_factory.mktemp("mock"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """The networks of the tests are so small that threads only slow them down."""
    torch.set_num_threads(1)
