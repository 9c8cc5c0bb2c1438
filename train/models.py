"""Networks by name. Attribute names are torchvision's: the recipe treats its ResNets alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

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


class SmallResNet(nn.Module):
    """For images of a few pixels: no pooling, stages of basic blocks, each but the first halving.

    [N, channels, H, W] -> [N, classes]; `widths` are the channels of the stages, `depth` their
    number of blocks. 6 depth + 2 layers with three stages, as in the CIFAR part of He et al. 2015,
    but with projection shortcuts.
    """

    def __init__(self, channels: int, widths: Sequence[int], depth: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        ins = (widths[0], *widths)
        self.stages = nn.Sequential(
            *(
                BasicBlock(ins[stage + (block > 0)], width, stride=2 if stage and not block else 1)
                for stage, width in enumerate(widths)
                for block in range(depth)
            )
        )
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(nnf.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean(dim=(2, 3)))


def _of_torchvision(name: str) -> Callable[[int], nn.Module]:
    """Stride 2 lies on the 3x3 convolution, as in the paper's variant (fb.resnet.torch)."""

    def make(num_classes: int) -> nn.Module:
        from torchvision import models  # a second of import

        return getattr(models, name)(weights=None, num_classes=num_classes)

    return make


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "digits-resnet": partial(SmallResNet, 1, (32, 64, 128), 1),
    "fashion-resnet8": partial(SmallResNet, 1, (16, 32, 64), 1),
    "cifar-resnet20": partial(SmallResNet, 3, (16, 32, 64), 3),
    "cifar-resnet56": partial(SmallResNet, 3, (16, 32, 64), 9),
    **{name: _of_torchvision(name) for name in ("resnet18", "resnet34", "resnet50", "resnet101")},
}


def build(
    name: str, num_classes: int, zero_gamma: bool = True, channels: int | None = None
) -> nn.Module:
    """A freshly initialised network, by torch's global generator.

    UsageError for an unknown name, and for one that does not take images of so many channels.
    """
    if name not in MODELS:
        raise UsageError(
            f"--model: given {name!r}, accepted: {', '.join(sorted(MODELS))}; choose one of these"
        )
    model = MODELS[name](num_classes)
    takes: int = model.conv1.in_channels  # type: ignore[assignment, union-attr]
    if channels not in (None, takes):
        raise UsageError(
            f"--model: given {name!r}, which takes images of {takes} channels, but those of the "
            f"data set have {channels}; choose another network or another --dataset"
        )
    initialise(model, zero_gamma)
    return model
