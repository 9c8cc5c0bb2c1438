"""The paper's augmentation and single-crop evaluation (PAPER 1.4), by torchvision on uint8 tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tvf

from train.data.images import Draw, Normalisation

# fb.resnet.torch, which the paper takes them from, in units of 0 to 255.
IMAGENET = Normalisation(
    mean=tuple(255 * m for m in (0.485, 0.456, 0.406)),
    std=tuple(255 * s for s in (0.229, 0.224, 0.225)),
)


class Transform:
    """RGB pixels [H, W, 3] -> [3, size, size] uint8.

    Training: a crop of 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3, scaled to `size`,
    and a flip in half of the cases; `jitter` varies brightness, contrast, saturation (the paper: 0).
    Evaluation, and training without `augment`: the shorter side to `resize`, then the middle.
    Scaling is bicubic, without aliasing.
    """

    def __init__(self, size: int, resize: int, jitter: float = 0.0, augment: bool = True) -> None:
        self.shape = (3, size, size)
        self._size, self._resize, self._augments = size, resize, augment
        steps: list[torch.nn.Module] = [
            v2.RandomResizedCrop(
                size,
                scale=(0.08, 1.0),
                ratio=(3 / 4, 4 / 3),
                interpolation=InterpolationMode.BICUBIC,
                antialias=True,
            ),
            v2.RandomHorizontalFlip(),
        ]
        if jitter:
            steps.append(v2.ColorJitter(jitter, jitter, jitter))
        self._augment = v2.Compose(steps)

    def __call__(self, rgb: np.ndarray, draw: Draw | None, image: int) -> Tensor:
        # A view with the memory order of the decoder: torchvision's resize is fastest on it.
        pixels = torch.from_numpy(rgb).permute(2, 0, 1)
        if draw is None or not self._augments:
            scaled = tvf.resize(
                pixels, [self._resize], interpolation=InterpolationMode.BICUBIC, antialias=True
            )
            return tvf.center_crop(scaled, [self._size, self._size])
        # torchvision draws from torch's generator, which is a part of a checkpoint.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_seed(draw, image))
            return self._augment(pixels)


def _seed(draw: Draw, image: int) -> int:
    """One per image and epoch: who loads it, in what order and after what, changes no crop."""
    return int(np.random.SeedSequence((*draw, image)).generate_state(1, np.uint64)[0])
