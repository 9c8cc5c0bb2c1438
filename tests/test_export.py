"""`python -m train export`: what others load is what the run has learnt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from train import checkpoint, export, models
from train.__main__ import main
from train.rundir import Run

safe_open = pytest.importorskip("safetensors", reason="safetensors is not installed").safe_open
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
torchvision_models = pytest.importorskip("torchvision.models", reason="no torchvision")


class Alone:
    """The communicator of a single rank."""

    rank, size = 0, 1

    def all_gather(self, output: torch.Tensor, source: torch.Tensor) -> None:
        output.copy_(source.view_as(output))


def save(run: Path, name: str, model: nn.Module) -> Path:
    """A checkpoint of the model in a run directory, as the trainer writes it."""
    run.mkdir()
    state = checkpoint.TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1), step=7)
    identity = {"model": name, "seed": 3}
    Run(run, None).store(checkpoint.collect(state, identity, Alone(), torn=False), keep=1)
    return run / "checkpoints" / "step_000007.pt"


def lived(model: nn.Module) -> nn.Module:
    """With weights, statistics and counters that no fresh network has."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else 11)
    return model


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_loads_the_file(tmp_path, capsys, name):
    network = lived(getattr(torchvision_models, name)(num_classes=7))
    save(tmp_path / "run", name, network.to(memory_format=torch.channels_last))
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out.safetensors")]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"torchvision.models.{name}(num_classes=7)" in line

    scope: dict[str, Any] = {
        "torchvision": SimpleNamespace(models=torchvision_models),
        "safetensors": SimpleNamespace(torch=safetensors),
    }
    exec(line, scope)  # what it tells the user to type
    loaded = scope["network"].state_dict()
    for key, value in network.state_dict().items():
        assert torch.equal(loaded[key], value), key


def test_exported_tensors_share_no_memory():
    """The format refuses views into one storage, and the copy must not change with training."""
    tensor = torch.arange(6.0).view(2, 3)
    copies = export.weights({"a": tensor, "b": tensor.t()})
    tensor.zero_()
    assert copies["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copies["b"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copies["b"].is_contiguous()


def test_our_own_network_says_how_it_loads(tmp_path, capsys):
    save(tmp_path / "run", "digits-resnet", lived(models.build("digits-resnet", 10)))
    assert main(["export", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "train.models.build('digits-resnet', 10)" in text
    assert "torchvision" not in text
    file = tmp_path / "run" / "weights.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {
            "model": "digits-resnet",
            "seed": "3",
            "iteration": "7",
            "bn_statistics": "worker0",
        }


def test_a_network_of_another_shape_is_not_promised_to_torchvision():
    network = torchvision_models.resnet18(num_classes=7)
    tensors = export.weights(network.state_dict())
    assert export.fits_torchvision("resnet18", tensors)
    assert not export.fits_torchvision("resnet34", tensors)
    assert not export.fits_torchvision("resnet18", {**tensors, "conv1.weight": torch.zeros(2)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "has no checkpoint"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1000]), "is damaged"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, capsys, damage, message):
    damage(save(tmp_path / "run", "digits-resnet", models.build("digits-resnet", 10)))
    assert main(["export", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path, capsys):
    save(tmp_path / "run", "digits-resnet", models.build("digits-resnet", 10))
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "none" / "x")]) == 2
    assert "--out: " in capsys.readouterr().err
