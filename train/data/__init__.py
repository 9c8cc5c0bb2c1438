"""Data sets, and who sees which image when.

`load` opens a data set; `batches` and `evaluation_batches` give a worker's share of it. Everything
random derives from seed, epoch and image: no rank, worker process or earlier epoch plays a part, so
a run continues at any iteration with the batches that it would have had.
"""

from train.data.datasets import DATASETS, Dataset, digits, held_out, load
from train.data.images import (
    UNREADABLE,
    Batches,
    Draw,
    Images,
    Part,
    batches,
    evaluation_batches,
)
from train.data.order import evaluation_part, part, permutation, steps_per_epoch

__all__ = [
    "DATASETS",
    "UNREADABLE",
    "Batches",
    "Dataset",
    "Draw",
    "Images",
    "Part",
    "batches",
    "digits",
    "evaluation_batches",
    "evaluation_part",
    "held_out",
    "load",
    "part",
    "permutation",
    "steps_per_epoch",
]
