"""Networks by name. Attribute names are torchvision's: the recipe treats its ResNets alike."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as nnf

from pyallreduce import UsageError
from train.recipe import initialise


class BasicBlock(nn.Module):
    """ReLU(shortcut(x) + bn2(conv2(ReLU(bn1(conv1(x)))))); the stride is the first convolution's."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(nnf.relu(self.bn1(self.conv1(x)))))
        return nnf.relu(residual + (x if self.downsample is None else self.downsample(x)))


class DigitsResNet(nn.Module):
    """Basic blocks of 32, 64 and 128 channels at 8x8, 4x4, 2x2: [N, 1, 8, 8] -> [N, classes]."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.layer1 = BasicBlock(32, 32, stride=1)
        self.layer2 = BasicBlock(32, 64, stride=2)
        self.layer3 = BasicBlock(64, 128, stride=2)
        self.fc = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nnf.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))


MODELS: dict[str, Callable[[int], nn.Module]] = {"digits-resnet": DigitsResNet}


def build(name: str, num_classes: int, zero_gamma: bool = True) -> nn.Module:
    """A freshly initialised network, by torch's global generator. UsageError for an unknown name."""
    if name not in MODELS:
        raise UsageError(
            f"--model: given {name!r}, accepted: {', '.join(sorted(MODELS))}; choose one of these"
        )
    model = MODELS[name](num_classes)
    initialise(model, zero_gamma)
    return model
