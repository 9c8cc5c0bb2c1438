"""One part (training, held out) of a data set: how requested images become normalised batches."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf

from train.data import order

# cross_entropy leaves such labels out of the loss, and no prediction equals them: an unreadable
# held-out image still counts once, as an error.
UNREADABLE = -100
CPU = torch.device("cpu")
_AUGMENTATION = 1  # tells its generator from that of the permutation


class Draw(NamedTuple):
    """What an epoch's augmentation is derived from; each image adds its id, so no worker matters."""

    seed: int
    epoch: int


class Request(NamedTuple):
    """One batch to be loaded: image ids in order, and the augmentation (None: evaluation)."""

    ids: np.ndarray
    draw: Draw | None


class Loaded(NamedTuple):
    """The answer: `pixels` [n, C, H, W], contiguous, `labels` [n] int64, what could not be
    read."""

    pixels: Tensor
    labels: Tensor
    unreadable: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Per channel, in units of the stored pixels (0 to 255): (x - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """`pixels` [n, C, H, W] as float32, on their device."""
        mean, std = (
            torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (self.mean, self.std)
        )
        # A copy, whatever dtype they have; three fast passes beat two of mixed dtypes.
        return pixels.to(torch.float32, copy=True).sub_(mean).div_(std)


class Part(Protocol):
    """What the samplers need to know of a data set's part."""

    @property
    def normalisation(self) -> Normalisation | None:
        """None: the stored pixels are normalised float32."""

    def __len__(self) -> int: ...

    def load(self, requests: Iterable[Request], pin_memory: bool) -> Iterator[Loaded]:
        """One answer per request, in that order; `pin_memory` for a transfer to a GPU."""


@dataclasses.dataclass(frozen=True)
class Images:
    """In memory. `pixels` [N, C, H, W], `labels` [N] int64.

    With `pad`, training crops after padding by that many black pixels on each side, and flips.
    """

    pixels: Tensor
    labels: Tensor
    normalisation: Normalisation | None = None
    pad: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, requests: Iterable[Request], pin_memory: bool = False) -> Iterator[Loaded]:
        for request in requests:
            ids = torch.from_numpy(request.ids)
            pixels = self.pixels[ids]
            if request.draw and self.pad:
                pixels = shift_and_flip(pixels, request.draw, request.ids, len(self), self.pad)
            yield Loaded(pixels, self.labels[ids])


def shift_and_flip(pixels: Tensor, draw: Draw, ids: np.ndarray, count: int, pad: int) -> Tensor:
    """The augmentation for small images: shift by up to `pad` pixels each way, flip every other."""
    top, left, flip = (torch.from_numpy(v[ids])[:, None] for v in _draws(draw, count, 2 * pad + 1))
    height, width = pixels.shape[2:]
    rows = top + torch.arange(height)
    columns = left + torch.where(flip, torch.arange(width).flip(0), torch.arange(width))
    image = torch.arange(len(pixels))[:, None, None]
    padded = nnf.pad(pixels, (pad, pad, pad, pad))
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@functools.lru_cache(maxsize=1)  # the epoch's table serves all its batches
def _draws(draw: Draw, count: int, bound: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two integers below `bound` and a bit for each of `count` ids, whoever asks for which."""
    bits = np.random.Philox(np.random.SeedSequence((draw.seed, draw.epoch, _AUGMENTATION)))
    generator = np.random.Generator(bits)
    top, left = generator.integers(bound, size=(2, count))
    return top, left, generator.integers(2, size=count).astype(bool)


Batches = Iterator[tuple[Tensor, Tensor]]


def batches(
    images: Part,
    *,
    seed: int,
    epoch: int,
    workers: Sequence[int],
    k: int,
    batch_size: int,
    steps: range,
    device: torch.device = CPU,
) -> Batches:
    """(pixels, labels) of each of this process's logical workers, of k in all, in turn, in each of
    those iterations of the epoch. At most `batch_size` images; none for an empty part."""
    permutation = order.permutation(seed, epoch, len(images))
    requests = (
        Request(order.part(permutation, step, batch_size * k, worker, k), Draw(seed, epoch))
        for step in steps
        for worker in workers
    )
    return _normalised(images, requests, device)


def evaluation_batches(
    images: Part, *, rank: int, size: int, batch_size: int, device: torch.device = CPU
) -> Batches:
    """This rank's share of a part, in order, without augmentation: over all ranks each image once.

    An image that cannot be read, where that is allowed, has the label UNREADABLE.
    """
    ids = order.evaluation_part(len(images), rank, size)
    requests = (
        Request(ids[first : first + batch_size], None) for first in range(0, len(ids), batch_size)
    )
    return _normalised(images, requests, device)


def _normalised(images: Part, requests: Iterator[Request], device: torch.device) -> Batches:
    cuda = device.type == "cuda"
    loaded = images.load(requests, pin_memory=cuda)
    normalise = images.normalisation or _identity
    if cuda:
        return _one_ahead(loaded, normalise, device)
    return ((_alone(normalise, b.pixels), b.labels) for b in loaded)


def _alone(normalise: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """Several threads would wait for cores that the loader's processes use: a fifth slower in all."""
    with one_thread():
        return normalise(pixels)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Little work for several, which mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _one_ahead(
    loaded: Iterator[Loaded], normalise: Callable[[Tensor], Tensor], device: torch.device
) -> Batches:
    """Copy and normalise the next batch on a stream of its own while the model uses this one."""
    side = torch.cuda.Stream(device)

    def start(batch: Loaded) -> tuple[Tensor, Tensor]:
        with torch.cuda.stream(side):
            pixels = batch.pixels.to(device, non_blocking=True)
            return normalise(pixels), batch.labels.to(device, non_blocking=True)

    def ready(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        user = torch.cuda.current_stream(device)
        user.wait_stream(side)
        for tensor in (pixels, labels):  # their memory is not reused before the user is done
            tensor.record_stream(user)
        return pixels, labels

    ahead = None
    for batch in loaded:
        # The wait covers what is on the side stream: take the old batch over before starting anew.
        taken, ahead = ahead and ready(*ahead), start(batch)
        if taken:
            yield taken
    if ahead:
        yield ready(*ahead)


def _identity(pixels: Tensor) -> Tensor:
    return pixels
