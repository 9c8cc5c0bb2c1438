"""Held-out error with every test image counted exactly once over all ranks."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

import pyallreduce as par
from train.data import Images

STATISTICS = "worker 0's running statistics"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """`error` and `accuracy` in percent, `loss` the mean cross-entropy, over `count` images."""

    correct: int
    count: int
    loss: float

    @property
    def accuracy(self) -> float:
        return 100.0 * self.correct / self.count

    @property
    def error(self) -> float:
        return 100.0 - self.accuracy


class Evaluator:
    """Evaluates a copy of the model under worker 0's batch-norm statistics (PAPER 1.5).

    Every worker keeps its own statistics while training, so one set has to be chosen: worker 0's,
    as in the paper's Caffe2 code. They travel into a copy: evaluating changes nothing that training
    reads, and does not pass through the hooks of the aggregator. Make it before the aggregator, for
    that reason.
    """

    def __init__(
        self, model: nn.Module, comm: par.Communicator, images: Images, batch_size: int = 256
    ) -> None:
        self._copy = copy.deepcopy(model).eval().requires_grad_(False)
        self._comm = comm
        self._images = images
        # Interleaved and never padded: parts may differ by one image, and no image appears in two.
        self.ids = torch.arange(comm.rank, len(images), comm.size)
        self._batch_size = batch_size

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Evaluation:
        """Collective: every rank calls it and gets the same numbers."""
        for mine, theirs in zip(self._copy.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
        self._take_statistics_of_worker_0(model)

        counts = torch.zeros(2, dtype=torch.int64)  # correct, seen
        loss = torch.zeros(1, dtype=torch.float64)
        for ids in self.ids.split(self._batch_size):
            logits = self._copy(self._images.pixels[ids])
            labels = self._images.labels[ids]
            loss += nnf.cross_entropy(logits, labels, reduction="sum").double()
            counts += torch.stack([(logits.argmax(1) == labels).sum(), torch.tensor(len(ids))])
        self._comm.all_reduce(counts, op="sum")
        self._comm.all_reduce(loss, op="sum")

        correct, seen = counts.tolist()
        if seen != len(self._images):
            raise RuntimeError(f"evaluation counted {seen} images instead of {len(self._images)}")
        return Evaluation(correct, seen, loss.item() / seen)

    def _take_statistics_of_worker_0(self, model: nn.Module) -> None:
        sources = [b for b in model.buffers() if b.is_floating_point()]
        targets = [b for b in self._copy.buffers() if b.is_floating_point()]
        if not sources:
            return
        flat: Tensor = torch.cat([b.flatten() for b in sources])
        self._comm.broadcast(flat, root=0)
        parts = flat.split([b.numel() for b in sources])
        for target, values in zip(targets, parts, strict=True):
            target.copy_(values.view_as(target))
