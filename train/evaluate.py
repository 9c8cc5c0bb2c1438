"""Held-out error with every test image counted exactly once over all ranks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.optim.swa_utils import update_bn

import pyallreduce as par
from train import data
from train.precision import Precision, wide
from train.watch import Watch

WORKER_0 = "worker 0's running statistics"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """`error` and `accuracy` in percent, `loss` the mean cross-entropy, over `count` images.

    `correct5` have their class among the network's best five. `statistics` names what batch norm
    normalised by.
    """

    correct: int
    correct5: int
    count: int
    loss: float
    statistics: str

    @property
    def accuracy(self) -> float:
        return 100.0 * self.correct / self.count

    @property
    def error(self) -> float:
        return 100.0 - self.accuracy

    @property
    def error5(self) -> float:
        """The top-5 error."""
        return 100.0 - 100.0 * self.correct5 / self.count


class Evaluator:
    """Evaluates a copy of the model under one set of batch-norm statistics (PAPER 1.5).

    Every worker keeps its own statistics while training, so one set has to be chosen: worker 0's,
    as in the paper's Caffe2 code, or averages over training images under the present weights, which
    running averages follow late when iterations are few. They go into a copy: evaluating changes
    nothing that training reads, and does not pass through the hooks of the aggregator. Make it
    before the aggregator, for that reason.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: par.Communicator,
        images: data.Part,
        precision: Precision,
        watch: Watch,
        batch_size: int = 64,
    ) -> None:
        self._copy = copy.deepcopy(model).eval().requires_grad_(False)
        self._comm = comm
        self._images = images
        self._precision, self._watch = precision, watch
        self._batch_size = batch_size

    @torch.no_grad()
    def __call__(self, model: nn.Module, training: data.Batches | None = None) -> Evaluation:
        """Collective: every rank calls it and gets the same numbers.

        With batches of `training` images, this rank's share of them, batch norm uses the averages
        of their means and variances; without, worker 0's running statistics. Interrupted on all
        ranks after the same batch when one was asked to stop.
        """
        for mine, theirs in zip(self._copy.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
        if training is None:
            self._take_statistics_of_worker_0(model)
            statistics = WORKER_0
        else:
            statistics = self._recompute_statistics(training)

        device = self._precision.device
        counts = torch.zeros(3, dtype=torch.int64, device=device)  # correct, correct5, seen
        loss = torch.zeros(1, dtype=torch.float64, device=device)
        for pixels, labels in self._batches():
            with self._precision.autocast():
                logits = self._copy(pixels)
            loss += nnf.cross_entropy(wide(logits), labels, reduction="sum").double()
            best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            correct = (logits.argmax(1) == labels).sum()
            counts += torch.stack([correct, best.sum(), correct.new_tensor(len(labels))])
        counts, loss = counts.cpu(), loss.cpu()
        self._comm.all_reduce(counts, op="sum")
        self._comm.all_reduce(loss, op="sum")

        right, right5, seen = counts.tolist()
        if seen != len(self._images):
            raise RuntimeError(f"evaluation counted {seen} images instead of {len(self._images)}")
        return Evaluation(right, right5, seen, loss.item() / seen, statistics)

    def statistics(self) -> dict[str, Tensor]:
        """Copies of what batch norm normalised by in the latest evaluation, under the model's names."""
        return {
            name: buffer.cpu().clone()
            for name, buffer in self._copy.named_buffers()
            if buffer.is_floating_point()
        }

    def _batches(self) -> data.Batches:
        batches = data.evaluation_batches(
            self._images,
            rank=self._comm.rank,
            size=self._comm.size,
            batch_size=self._batch_size,
            device=self._precision.device,
        )
        largest = -(-len(self._images) // self._comm.size)  # share of a rank
        rounds = -(-largest // self._batch_size)
        return self._precision.arranged(self._watch.polled(batches, rounds))

    def _take_statistics_of_worker_0(self, model: nn.Module) -> None:
        flat = _flat_statistics(model).cpu()
        self._comm.broadcast(flat, root=0)
        self._set_statistics(flat)

    def _recompute_statistics(self, training: data.Batches) -> str:
        """The mean over all ranks' batches of what each batch would be normalised by."""
        seen = torch.zeros(2, dtype=torch.int64)  # batches, images

        def counted() -> Iterator[Tensor]:
            for pixels, _ in training:
                seen.add_(torch.tensor([1, len(pixels)]))
                yield pixels

        with self._precision.autocast():
            update_bn(counted(), self._copy)
        flat = _flat_statistics(self._copy).cpu().double() * seen[0]
        self._comm.all_reduce(seen, op="sum")
        self._comm.all_reduce(flat, op="sum")
        batches, images = seen.tolist()
        self._set_statistics(flat / batches)
        return f"statistics recomputed over {images} training images, {images // batches} at a time"

    def _set_statistics(self, flat: Tensor) -> None:
        targets = _statistics(self._copy)
        for target, values in zip(targets, flat.split([t.numel() for t in targets]), strict=True):
            target.copy_(values.view_as(target))


def _statistics(model: nn.Module) -> list[Tensor]:
    return [b for b in model.buffers() if b.is_floating_point()]


def _flat_statistics(model: nn.Module) -> Tensor:
    parts = [b.flatten() for b in _statistics(model)]
    return torch.cat(parts) if parts else torch.empty(0)
