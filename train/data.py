"""Data sets in memory, their fixed held-out split, and who sees which image when (Remark 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pyallreduce import UsageError

TEST_EVERY = 5


@dataclasses.dataclass(frozen=True)
class Images:
    """`pixels` [N, C, H, W] float32, normalised; `labels` [N] int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    train: Images
    test: Images
    num_classes: int


def held_out(labels: np.ndarray) -> np.ndarray:
    """Ids of the test images, sorted: of every class its 1st, 6th, 11th, ... image in file order.

    Stratified, and fixed without a generator: the split is the same under every version of every
    library.
    """
    return np.sort(
        np.concatenate([np.flatnonzero(labels == c)[::TEST_EVERY] for c in np.unique(labels)])
    )


def digits() -> Dataset:
    """scikit-learn's handwritten digits: 1433 training and 364 test images [1, 8, 8]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError(
            f"the data set 'digits' is part of scikit-learn, which cannot be imported "
            f"({error}); run: pip install 'pyallreduce[train]'"
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    test = np.zeros(len(labels), dtype=bool)
    test[held_out(labels)] = True
    # Statistics of the training part only: the test images must not leak into them.
    scaled = (pixels - pixels[~test].mean()) / pixels[~test].std()
    images = torch.from_numpy(scaled.astype(np.float32)).view(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    mask = torch.from_numpy(test)
    return Dataset(Images(images[~mask], targets[~mask]), Images(images[mask], targets[mask]), 10)


DATASETS: dict[str, Callable[[], Dataset]] = {"digits": digits}


def load(name: str) -> Dataset:
    """The data set of that name. UsageError for an unknown one."""
    if name not in DATASETS:
        raise UsageError(
            f"--dataset: given {name!r}, accepted: {', '.join(sorted(DATASETS))}; "
            "choose one of these"
        )
    return DATASETS[name]()


def steps_per_epoch(num_images: int, minibatch: int, drop_last: bool = True) -> int:
    """Minibatches of kn images in one epoch.

    The rest of the images is left out, as in Caffe2's trainer, or makes a smaller last minibatch.
    """
    if minibatch > num_images:
        raise UsageError(
            f"--batch-size: the minibatch over all workers has {minibatch} images, "
            f"accepted: at most the {num_images} training images; lower --batch-size, "
            "--minibatch or the number of processes"
        )
    whole, rest = divmod(num_images, minibatch)
    return whole if drop_last or not rest else whole + 1


def permutation(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The epoch's order of all images: every worker derives the same one from (seed, epoch) alone.

    A counter-based generator: an epoch needs no state of the one before, so resuming cannot shift
    it.
    """
    bits = np.random.Philox(np.random.SeedSequence((seed, epoch)))
    return np.random.Generator(bits).permutation(num_images)


def part(order: np.ndarray, step: int, minibatch: int, worker: int, k: int) -> np.ndarray:
    """Ids of the images that `worker` of `k` sees in iteration `step` of the epoch.

    Interleaved inside the minibatch: for a given kn the minibatch is the same set whatever k is.
    A smaller last minibatch goes to as few workers as can take it, so that batch norm keeps as many
    samples as it can; the others' parts are empty.
    """
    ids = order[step * minibatch : (step + 1) * minibatch]
    needed = -(-len(ids) * k // minibatch)
    return ids[worker::needed] if worker < needed else ids[:0]


Batches = Iterator[tuple[Tensor, Tensor]]


def batches(
    images: Images,
    *,
    seed: int,
    epoch: int,
    workers: Sequence[int],
    k: int,
    batch_size: int,
    steps: range,
) -> Batches:
    """(pixels, labels) of each of this process's logical workers, of k in all, in turn, in each of
    those iterations of the epoch. At most `batch_size` images; none for an empty part."""
    order = permutation(seed, epoch, len(images))
    for step in steps:
        for worker in workers:
            ids = torch.from_numpy(part(order, step, batch_size * k, worker, k))
            yield images.pixels[ids], images.labels[ids]
