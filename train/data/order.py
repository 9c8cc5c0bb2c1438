"""Who sees which image when (Remark 4): pure functions of seed, epoch, iteration and worker."""

from __future__ import annotations

import numpy as np

from pyallreduce import UsageError


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


def evaluation_part(num_images: int, rank: int, size: int) -> np.ndarray:
    """Ids that `rank` evaluates. Never padded: parts may differ by one, no image is in two."""
    return np.arange(rank, num_images, size)
