"""Everything one training needs, made in the one order that works."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import pyallreduce as par
from train import checkpoint, data, models, recipe, rundir
from train.config import Config
from train.evaluate import Evaluation, Evaluator
from train.metrics import Meter
from train.workers import Minibatch, minibatches


@dataclasses.dataclass(frozen=True)
class Job:
    """`k` logical workers; `steps` iterations make an epoch; the job ends after iteration `last`."""

    cfg: Config
    comm: par.Communicator
    dataset: data.Dataset
    k: int
    steps: int
    last: int
    schedule: recipe.Schedule
    state: checkpoint.TrainState
    aggregator: par.GradientAggregator
    evaluator: Evaluator
    meter: Meter
    run: rundir.Run

    @property
    def minibatch(self) -> int:
        """kn, the images of an iteration over all workers."""
        return self.k * self.cfg.batch_size

    @property
    def workers(self) -> range:
        """The logical workers of this process; worker 0 is the first of rank 0."""
        return range(self.comm.rank, self.k, self.comm.size)

    def minibatches(self, epoch: int) -> Iterator[Minibatch]:
        """The iterations of the epoch, from the one that the state has reached to `last`."""
        first = self.state.step - epoch * self.steps
        steps = range(first, min(self.steps, first + self.last - self.state.step))
        images = len(self.dataset.train)
        totals = (min(self.minibatch, images - step * self.minibatch) for step in steps)
        batches = self.meter.timed(self.batches(epoch, self.workers, steps))
        return minibatches(totals, batches, self.workers, self.state.model, self.aggregator)

    def evaluate(self) -> Evaluation:
        """Collective: the held-out error of the present weights, under --bn-statistics."""
        if self.cfg.bn_statistics == "worker0":
            return self.evaluator(self.state.model)
        return self.evaluator(self.state.model, self._images_for_statistics())

    def _images_for_statistics(self) -> data.Batches:
        """About --bn-images of the latest epoch, by its first iterations' first workers."""
        images = min(self.cfg.bn_images, len(self.dataset.train))
        k = max(1, min(self.k, images // self.cfg.batch_size))
        workers = range(self.comm.rank, k, self.comm.size)
        epoch = max(0, self.state.step - 1) // self.steps
        return self.batches(epoch, workers, range(max(1, images // self.minibatch)))

    def batches(self, epoch: int, workers: range, steps: range) -> data.Batches:
        return data.batches(
            self.dataset.train,
            seed=self.cfg.seed,
            epoch=epoch,
            workers=workers,
            k=self.k,
            batch_size=self.cfg.batch_size,
            steps=steps,
        )

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum over the images, to be divided by their number over all workers."""
        return cross_entropy(
            logits, labels, reduction="sum", label_smoothing=self.cfg.label_smoothing
        )

    def end_iteration(self) -> None:
        """After the update. Whatever has to happen between two iterations belongs here."""
        self.state.step += 1
        self.meter.end_iteration()

    def save(self) -> None:
        """Collective: write the checkpoint."""
        checkpoint.save(
            self.run.checkpoint, self.state, self.identity, self.comm, torn=self.aggregator.torn
        )

    @property
    def identity(self) -> dict[str, object]:
        return identity(self.cfg, self.comm, self.k, self.dataset)


def identity(
    cfg: Config, comm: par.Communicator, k: int, dataset: data.Dataset
) -> dict[str, object]:
    """What must be equal for a checkpoint to continue to the same bits."""
    return {
        "world size": comm.size,
        "workers": k,
        "preset": cfg.preset,
        "list of images": dataset.fingerprint,
        **cfg.recipe(),
    }


def prepare(cfg: Config, comm: par.Communicator) -> Job:
    """Collective: build the job, resumed from its checkpoint if one is asked for and there.

    UsageError when the configuration does not fit the data, the processes or the checkpoint; nothing
    is on the disk before all of that is known.
    """
    dataset = data.load(cfg, comm)
    k = recipe.number_of_workers(
        cfg.batch_size, cfg.minibatch, cfg.virtual_workers, processes=comm.size
    )
    minibatch = k * cfg.batch_size
    steps = data.steps_per_epoch(len(dataset.train), minibatch, cfg.drop_last)
    schedule = recipe.make_schedule(
        minibatch=minibatch,
        steps_per_epoch=steps,
        epochs=cfg.epochs,
        reference_lr=cfg.lr,
        reference_minibatch=cfg.reference_minibatch,
        warmup_epochs=cfg.warmup_epochs,
        drops=cfg.drops,
        lr_rule=cfg.lr_rule,
        warmup=cfg.warmup,
    )
    torch.manual_seed(cfg.seed)
    model = models.build(cfg.model, dataset.num_classes, cfg.zero_gamma)
    resume_from, resuming = rundir.find_checkpoint(cfg, comm)
    content = (
        checkpoint.load(resume_from, identity(cfg, comm, k, dataset), comm) if resuming else None
    )
    run = rundir.open_run(cfg, comm, resume_from)

    evaluator = Evaluator(model, comm, dataset.test)
    optimizer = par.SGD(
        recipe.parameter_groups(model, cfg.weight_decay),
        lr=schedule(0),
        momentum=cfg.momentum,
        nesterov=cfg.nesterov,
        form=cfg.momentum_form,
        correction=cfg.momentum_correction,
    )
    aggregator = par.GradientAggregator(
        model,
        comm,
        op="sum",
        bucket_bytes=cfg.bucket_kib << 10,
        optimizer=optimizer,
        update=cfg.update,
        max_norm=cfg.max_norm,
    )
    state = checkpoint.TrainState(model, optimizer)
    if content:  # after the aggregator, which gives every rank the buffers of rank 0
        checkpoint.restore(state, content, comm)
    return Job(
        cfg=cfg,
        comm=comm,
        dataset=dataset,
        k=k,
        steps=steps,
        last=min(schedule.total, cfg.max_steps or schedule.total),
        schedule=schedule,
        state=state,
        aggregator=aggregator,
        evaluator=evaluator,
        meter=Meter(comm, aggregator, minibatch),
        run=run,
    )
