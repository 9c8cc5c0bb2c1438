"""Precision and device: what computes in 16 bits, what never does, and what a checkpoint keeps."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import Any

import mocked
import pytest
import torch
from torch import nn

import pyallreduce as par
from pyallreduce import _core, gpu
from ranks import run_ranks
from train import checkpoint, data, loop, models, precision, rundir
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
    """The communicator of rank 1 on a host of two; the other rank answers as it is told to."""

    rank, size, local_rank, local_size = 1, 2, 1, 2

    def __init__(self, other: str) -> None:
        self._other = other.encode()

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        rows = output.view(2, -1)
        rows[0, : len(self._other)] = torch.tensor(list(self._other), dtype=torch.uint8)
        rows[0, len(self._other) :] = 0
        rows[1] = tensor


GOOD, BAD = "+a GPU", "---device: the library cannot work on cuda:0 (no NCCL)"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """So many GPUs in sight, on which the library works or not."""

    def see(count: int, works: bool = True) -> None:
        def try_it(device: torch.device) -> None:
            if not works:
                raise par.Error("no CUDA kernels")

        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(precision, "_try_library_on", try_it)

    return see


@pytest.mark.parametrize(
    ("wanted", "count", "works", "other", "chosen"),
    [
        ("auto", 0, True, GOOD, "cpu"),
        ("auto", 1, True, GOOD, "cpu"),
        ("auto", 2, True, GOOD, "cuda:1"),
        ("auto", 2, False, GOOD, "cpu"),
        ("auto", 2, True, BAD, "cpu"),
        ("cpu", 2, True, BAD, "cpu"),
        ("cuda", 2, True, GOOD, "cuda:1"),
    ],
)
def test_gpus_are_taken_where_all_ranks_can_work_on_theirs(
    gpus, wanted, count, works, other, chosen
):
    gpus(count, works)
    assert choose_device(wanted, Host(other)) == torch.device(chosen)


@pytest.mark.parametrize(
    ("count", "works", "other", "message"),
    [
        (1, True, GOOD, "^rank 1: --device: a host has 1 GPUs for 2 processes"),
        (2, False, GOOD, r"^rank 1: --device: .* cannot work on cuda:1 \(no CUDA kernels\)"),
        (2, True, BAD, r"^--device: .* cuda:0 \(no NCCL\)"),
    ],
)
def test_gpus_that_were_asked_for_are_missed_on_all_ranks(gpus, count, works, other, message):
    gpus(count, works)
    with pytest.raises(par.UsageError, match=message):
        choose_device("cuda", Host(other))


def try_with_and_without(rank: int, size: int) -> list[str]:
    """What is said with all there is, without kernels, and without NCCL; over the mock."""
    mock = mocked.install(everything=True)
    answers = []

    def try_it() -> None:
        try:
            precision._try_library_on(torch.device("cpu"))
            answers.append(f"settled {mock.num_settled > 0}")
        except par.Error as error:
            answers.append(str(error))

    try_it()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mocked.MockedGpu, "kernels", gpu.Gpu.kernels)
        patch.setattr(_core, "has_cuda", False)
        try_it()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYALLREDUCE_NCCL", "/nowhere/libnccl.so")
        try_it()
    return answers


def test_the_library_is_tried_with_its_kernels_and_nccl(mocks):
    ((good, kernels, nccl),) = run_ranks(1, try_with_and_without, env=mocked.environment(mocks))
    assert good == "settled True"  # a reduction went through the device
    assert "CUDA kernels" in kernels
    assert "/nowhere/libnccl.so" in nccl


def test_flags():
    cfg = parse("classify", ["--no-channels-last", "--precision", "bf16", "--device", "cpu"])
    assert (cfg.channels_last, cfg.precision, cfg.device) == (False, "bf16", "cpu")
    assert parse("classify", []).channels_last is None
    assert str(Precision(cfg, torch.device("cpu"))) == "bf16 on cpu, contiguous_format"
