"""What another process has written is checked before it is used; and the machinery that looks for holes is in place.

The holes themselves are looked for by ``make sanitize`` and ``make fuzz``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import pyallreduce as par
from pyallreduce import _core, rendezvous

ROOT = Path(__file__).parent.parent
GOOD = {"token": "0" * 64, "node": "here", "size": 2, "version": rendezvous.__version__}


class Store:
    """A store in which rank 1 has written ``payload``, and has read everything."""

    def __init__(self, payload: bytes) -> None:
        self._values = {"communicator/1/1": payload}

    def add(self, key: str, amount: int) -> int:
        return 2 if key.endswith("/read") else amount

    def set(self, key: str, value: str) -> None:
        self._values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)


def record(**changes: Any) -> bytes:
    return json.dumps({k: v for k, v in (GOOD | changes).items() if v is not ...}).encode()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff\xfe\xfd",
        b"[" * 100_000,
        b"[]",
        b"null",
        record(size=...),
        record(size="2"),
        record(size=True),
        record(node=["here"]),
        record(token="0" * 65),
        record(token="ü" * 64),
    ],
    ids=lambda payload: repr(payload[:40]),
)
def test_a_strange_record_in_the_store_names_its_rank(payload: bytes) -> None:
    with pytest.raises(par.MismatchError, match="rank 1 wrote no record") as caught:
        rendezvous.meet(Store(payload), 0, 2, timeout_s=1.0)
    assert caught.value.peers == (1,)


def test_a_good_record_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_node_key", lambda: "here")
    roster = rendezvous.meet(Store(record()), 0, 2, timeout_s=1.0)
    assert roster.node_ranks == (0, 1)


def test_a_message_that_is_no_utf_8_keeps_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages may hold a peer's bytes, or the environment's."""
    with pytest.raises(par.UsageError, match="socket name too long"):
        _core.Communicator(0, [0, 1], b"\xff" * 200, "token", 1.0)
    os.environb[b"PYALLREDUCE_PORT"] = b"\xff"
    try:
        with pytest.raises(par.UsageError, match="PYALLREDUCE_PORT=\ufffd: expected a number"):
            _core.read_env()
    finally:
        del os.environb[b"PYALLREDUCE_PORT"]


@pytest.mark.parametrize("target", ["sanitize", "arm64", "fuzz"])
def test_the_targets_are_there_and_in_ci(target: str) -> None:
    assert target in (ROOT / ".ci" / "run").read_text()
    make = shutil.which("make")
    if make is None:
        pytest.skip("no make on PATH")
    plan = subprocess.run(
        [make, "--dry-run", target], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert plan.returncode == 0, plan.stderr
    assert "tests/cpp" in plan.stdout or "PYALLREDUCE_TESTS=ON" in plan.stdout


@pytest.mark.parametrize("target", ["page", "messages", "handshake"])
def test_every_fuzzer_has_a_corpus(target: str) -> None:
    assert any((ROOT / "tests" / "cpp" / "fuzz" / "corpus" / target).iterdir())
