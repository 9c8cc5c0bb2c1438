"""Precision and device: what computes in 16 bits, what never does, and what a checkpoint keeps."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pyallreduce as par
from ranks import run_ranks
from train import checkpoint, data, loop, models, rundir
from train.config import Config, load_preset, parse
from train.precision import Precision, choose_device, wide

pytestmark = pytest.mark.deadline(240)
# Few images: 16 bits are slow on a CPU that has no instructions for them.
SMALL = {"batch_size": 16, "report": False}


def make_config(output: Path | str = "", **values: Any) -> Config:
    return Config(**{**load_preset("digits"), **SMALL, "output_dir": str(output), **values})


def few_digits(*_: Any) -> data.Dataset:
    digits = data.digits()
    parts = (digits.train, 96), (digits.test, 32)
    train, test = (data.Images(p.pixels[:n], p.labels[:n], p.normalisation) for p, n in parts)
    return dataclasses.replace(digits, train=train, test=test)


def train(output: Path, name: str, **values: Any) -> dict[str, Any]:
    """The newest checkpoint of a run of one process."""
    with pytest.MonkeyPatch.context() as patch, closing(par.init(timeout_s=20)) as comm:
        patch.setattr(data, "load", few_digits)
        loop.train(make_config(output, name=name, **values), comm)
    return checkpoint.read(rundir.checkpoint_files(output / name)[0])


def gap(a: dict[str, Any], b: dict[str, Any]) -> float:
    return max(
        float((a["model"][k] - b["model"][k]).abs().max()) for k in ("conv1.weight", "fc.weight")
    )


def dtypes_seen(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Of the logits of every forward pass from now on."""
    seen: set[torch.dtype] = set()

    def note(logits: torch.Tensor) -> torch.Tensor:
        seen.add(logits.dtype)
        return wide(logits)

    monkeypatch.setattr("train.job.wide", note)
    monkeypatch.setattr("train.evaluate.wide", note)
    return seen


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("plain"), "fp32", max_steps=4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_computes_in_16_bits_and_keeps_weights_in_32(
    tmp_path, monkeypatch, plain, precision
):
    seen = dtypes_seen(monkeypatch)
    ours = train(tmp_path, precision, precision=precision, max_steps=4)
    assert seen == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    floats = [t for t in ours["model"].values() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {torch.float32}
    assert 0 < gap(ours, plain) < 0.02  # another rounding, the same training
    assert bool(ours["scaler"]) == (precision == "fp16")


@pytest.mark.parametrize(
    "values", [{"precision": "fp16"}, {"precision": "bf16", "update": "eager"}]
)
def test_a_resumed_run_in_16_bits_has_the_same_bits(tmp_path, values):
    straight = train(tmp_path, "straight", **values, max_steps=4)
    train(tmp_path, "pieces", **values, max_steps=2)
    pieces = train(tmp_path, "pieces", **values, max_steps=4, resume="auto")
    for key in ("model", "optimizer", "scaler"):
        assert checkpoint.digest(straight[key]) == checkpoint.digest(pieces[key]), key


def overflow(rank: int, size: int, output: str) -> list[Any]:
    """Rank 1's scaled gradients overflow in the first iteration: no rank updates."""
    before: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    scale = torch.amp.GradScaler.scale
    calls = []

    def scale_too_far(self: torch.amp.GradScaler, loss: torch.Tensor) -> Any:
        calls.append(loss)
        return scale(self, loss) * (1e38 if rank == 1 and len(calls) == 1 else 1)

    def remember(self: Any, lr: float) -> None:
        weights.append(self._job.state.model.fc.weight.detach().clone())

    prepare = loop.prepare

    def prepared(cfg: Config, comm: par.Communicator) -> Any:
        job = prepare(cfg, comm)
        before.append(job.state.model.fc.weight.detach().clone())
        return job

    with pytest.MonkeyPatch.context() as patch, closing(par.init(timeout_s=20)) as comm:
        patch.setattr(data, "load", few_digits)
        patch.setattr(torch.amp.GradScaler, "scale", scale_too_far)
        patch.setattr(loop.RunLog, "iteration", remember)
        patch.setattr(loop, "prepare", prepared)
        loop.train(make_config(output, precision="fp16", max_steps=2), comm)
    return [torch.equal(before[0], weights[0]), torch.equal(weights[0], weights[1])]


def test_an_overflow_on_one_rank_skips_the_update_on_all(tmp_path):
    assert run_ranks(2, overflow, str(tmp_path)) == [[True, False]] * 2


def test_channels_last_changes_the_memory_and_not_the_training(tmp_path, plain):
    ours = train(tmp_path, "nhwc", channels_last=True, max_steps=4)
    kernel = ours["model"]["stages.0.conv1.weight"]
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert not kernel.is_contiguous()
    assert gap(ours, plain) < 0.02


def test_compile_covers_the_forward_and_spares_the_hooks(monkeypatch):
    """The compiler is a stub: its code is torch's matter, and takes a minute."""
    compiled: list[str] = []

    def stub(forward: Any) -> Any:
        compiled.append(forward.__qualname__)
        return forward

    monkeypatch.setattr(torch, "compile", stub)
    model = models.build("digits-resnet", 10)
    calls: list[nn.Module] = []
    model.register_forward_hook(lambda module, *_: calls.append(module))
    for asked in (False, True):
        Precision(make_config(compile=asked), torch.device("cpu")).compile(model)
    model(torch.randn(2, 1, 8, 8))
    assert len(compiled) == 1
    assert compiled[0].endswith(".forward")
    assert calls == [model]


def test_a_loss_is_never_summed_in_16_bits():
    assert wide(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert wide(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_fp16_and_eager_are_refused():
    with pytest.raises(par.UsageError, match=r"--precision fp16: .*give --update step"):
        make_config(precision="fp16", update="eager")


class Host:
    """The communicator of one rank on a host with as many."""

    local_rank, local_size = 1, 2

    def __init__(self, reduces_cuda: bool = True) -> None:
        self._reduces_cuda = reduces_cuda

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> None: ...
    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        if not self._reduces_cuda:
            raise par.UsageError("this communicator works on CPU tensors")


@pytest.mark.parametrize(
    ("wanted", "gpus", "reduces", "chosen"),
    [
        ("auto", 0, True, "cpu"),
        ("auto", 1, True, "cpu"),
        ("auto", 2, True, "cuda:1"),
        ("auto", 2, False, "cpu"),
        ("cpu", 2, True, "cpu"),
        ("cuda", 2, True, "cuda:1"),
    ],
)
def test_a_gpu_is_taken_where_every_rank_has_one(monkeypatch, wanted, gpus, reduces, chosen):
    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "zeros", lambda *sizes, **_: zeros(*sizes))
    assert choose_device(wanted, Host(reduces)) == torch.device(chosen)


def test_missing_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(par.UsageError, match="--device: given cuda, but a host has 1 GPU"):
        choose_device("cuda", Host())


def test_flags():
    cfg = parse("classify", ["--no-channels-last", "--precision", "bf16", "--device", "cpu"])
    assert (cfg.channels_last, cfg.precision, cfg.device) == (False, "bf16", "cpu")
    assert parse("classify", []).channels_last is None
    assert str(Precision(cfg, torch.device("cpu"))) == "bf16 on cpu, contiguous_format"
