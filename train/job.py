"""Everything one training needs, made in the one order that works."""

from __future__ import annotations

import dataclasses

import torch

import pyallreduce as par
from train import checkpoint, data, models, recipe, rundir
from train.config import Config
from train.evaluate import Evaluator
from train.metrics import Meter


@dataclasses.dataclass(frozen=True)
class Job:
    """`steps` iterations make an epoch; the job ends after iteration `last`."""

    cfg: Config
    comm: par.Communicator
    dataset: data.Dataset
    steps: int
    last: int
    schedule: recipe.Schedule
    state: checkpoint.TrainState
    aggregator: par.GradientAggregator
    evaluate: Evaluator
    meter: Meter
    run: rundir.Run

    def batches(self, epoch: int) -> data.Batches:
        """This rank's share of the epoch, from the iteration that the state has reached to `last`."""
        first = self.state.step - epoch * self.steps
        return data.batches(
            self.dataset.train,
            seed=self.cfg.seed,
            epoch=epoch,
            rank=self.comm.rank,
            size=self.comm.size,
            batch_size=self.cfg.batch_size,
            steps=range(first, min(self.steps, first + self.last - self.state.step)),
        )

    def save(self) -> None:
        """Collective: write the checkpoint."""
        checkpoint.save(
            self.run.checkpoint, self.state, self.identity, self.comm, torn=self.aggregator.torn
        )

    @property
    def identity(self) -> dict[str, object]:
        return identity(self.cfg, self.comm)


def identity(cfg: Config, comm: par.Communicator) -> dict[str, object]:
    """What must be equal for a checkpoint to continue to the same bits."""
    return {"world size": comm.size, "preset": cfg.preset, **cfg.recipe()}


def prepare(cfg: Config, comm: par.Communicator) -> Job:
    """Collective: build the job, resumed from its checkpoint if one is asked for and there.

    UsageError when the configuration does not fit the data, the processes or the checkpoint; nothing
    is on the disk before all of that is known.
    """
    dataset = data.load(cfg.dataset)
    steps = data.steps_per_epoch(len(dataset.train), cfg.batch_size * comm.size)
    schedule = recipe.make_schedule(
        minibatch=cfg.batch_size * comm.size,
        steps_per_epoch=steps,
        epochs=cfg.epochs,
        reference_lr=cfg.lr,
        reference_minibatch=cfg.reference_minibatch,
        warmup_epochs=cfg.warmup_epochs,
        drops=cfg.drops,
    )
    torch.manual_seed(cfg.seed)
    model = models.build(cfg.model, dataset.num_classes)
    resume_from, resuming = rundir.find_checkpoint(cfg, comm)
    content = checkpoint.load(resume_from, identity(cfg, comm), comm) if resuming else None
    run = rundir.open_run(cfg, comm, resume_from)

    evaluate = Evaluator(model, comm, dataset.test)
    optimizer = par.SGD(
        recipe.parameter_groups(model, cfg.weight_decay),
        lr=schedule(0),
        momentum=cfg.momentum,
        nesterov=True,
        form=cfg.momentum_form,
    )
    aggregator = par.GradientAggregator(
        model,
        comm,
        op="sum",
        bucket_bytes=cfg.bucket_kib << 10,
        optimizer=optimizer,
        update=cfg.update,
    )
    state = checkpoint.TrainState(model, optimizer)
    if content:  # after the aggregator, which gives every rank the buffers of rank 0
        checkpoint.restore(state, content, comm)
    return Job(
        cfg=cfg,
        comm=comm,
        dataset=dataset,
        steps=steps,
        last=min(schedule.total, cfg.max_steps or schedule.total),
        schedule=schedule,
        state=state,
        aggregator=aggregator,
        evaluate=evaluate,
        meter=Meter(comm, aggregator, cfg.batch_size),
        run=run,
    )
