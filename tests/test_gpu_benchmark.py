"""benchmarks/gpu/kernels.py without a GPU: every line of it runs, on the twin, and wrong results are noticed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks.gpu import kernels as benchmark


@pytest.fixture(scope="module")
def dry_run() -> list[dict[str, Any]]:
    result = subprocess.run(
        [sys.executable, benchmark.__file__, "--dry-run", "--sweep"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_the_benchmark_verifies_every_method_of_a_dry_run(dry_run: list[dict[str, Any]]) -> None:
    assert dry_run[0]["dry_run"]
    results = [line for line in dry_run if "method" in line]
    assert {line["case"] for line in results} == {
        "copy", "update", "update, nesterov", "scale, unpack, update, zero", "inspect",
        "update, bfloat16 gradients and copy", "elementwise", "sweep of the update",
    }  # fmt: skip
    assert all(line["verified"] and line["error"] <= line["tolerance"] for line in results)
    counts = {(line["case"], line["method"]): line["bytes"] for line in results}
    elements = dry_run[0]["elements"]
    assert counts["update", "ours"] == counts["update", "torch fused"] == 20 * elements
    assert counts["scale, unpack, update, zero", "ours"] == 24 * elements
    assert counts["update, bfloat16 gradients and copy", "ours"] == 20 * elements
    assert counts["elementwise", "pack float32 to bfloat16"] == 6 * elements


def test_a_dry_run_claims_nothing(dry_run: list[dict[str, Any]]) -> None:
    bars = [line for line in dry_run if "bar" in line]
    assert len(bars) == 12
    assert all(line["met"] is None for line in bars)


def test_the_benchmark_notices_wrong_results(capsys: pytest.CaptureFixture[str]) -> None:
    machine = benchmark.dry_run()
    for name, wrong in {
        "unwritten": lambda p: None,
        "nan": lambda p: p.weights.fill_(math.nan),
        "one element": lambda p: p.weights[3].add_(0.5),
    }.items():
        parameters = benchmark.Parameters(machine)
        method = benchmark.update_by_ours(parameters, name)
        right = method.run if name == "one element" else lambda: None
        method.run = lambda right=right, wrong=wrong, p=parameters: (right(), wrong(p))
        book = benchmark.Book(machine)
        book.copy_gb_per_s = 1.0
        book.measure("update", method)
        assert not book.all_right, name
        assert not json.loads(capsys.readouterr().out)["verified"]


def test_the_benchmark_knows_resnet50() -> None:
    sizes = benchmark.resnet50_sizes()
    assert (len(sizes), sum(sizes)) == (161, 25_557_032)


def test_without_a_gpu_the_benchmark_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main() == 2
    assert "needs a GPU" in capsys.readouterr().err
