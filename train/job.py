"""Everything one training needs, made in the one order that works."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import pyallreduce as par
from train import checkpoint, data, models, recipe, resume, rundir
from train.collective import by_rank_0
from train.config import Config
from train.evaluate import Evaluation, Evaluator
from train.metrics import Meter
from train.precision import Precision, choose_device, wide
from train.profiling import to_trace, traced
from train.watch import Interrupted, Watch
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
    precision: Precision
    watch: Watch
    run: rundir.Run
    notices: tuple[str, ...]
    plan: dict[str, Any]
    traced: range

    @property
    def epoch(self) -> int | None:
        """The epoch to go on with, if only by evaluating it; None when the job is done."""
        if self.cfg.test_only:
            return None
        step = self.state.step
        ends = step % self.steps == 0 or step >= self.last
        if ends and self.state.evaluated < step:
            return (step - 1) // self.steps
        return step // self.steps if step < self.last else None

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
        if first == 0:
            self.meter.begin_epoch()
        steps = range(first, min(self.steps, first + self.last - self.state.step))
        images = len(self.dataset.train)
        totals = (min(self.minibatch, images - step * self.minibatch) for step in steps)
        batches = self.meter.timed(self.batches(epoch, self.workers, steps))
        found = minibatches(totals, batches, self.workers, self.state.model, self.aggregator)
        if self.run.path is None:  # rank 0 alone has one
            return found
        return traced(found, self.state.step, self.traced, self.run.path)

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
        steps = range(max(1, images // self.minibatch))
        rounds = len(steps) * -(-k // self.comm.size)  # of a rank with most workers
        return self.watch.polled(self.batches(epoch, workers, steps), rounds)

    def batches(self, epoch: int, workers: range, steps: range) -> data.Batches:
        batches = data.batches(
            self.dataset.train,
            seed=self.cfg.seed,
            epoch=epoch,
            workers=workers,
            k=self.k,
            batch_size=self.cfg.batch_size,
            steps=steps,
            device=self.precision.device,
        )
        return self.precision.arranged(batches)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum over the images, to be divided by their number over all workers."""
        return cross_entropy(
            wide(logits), labels, reduction="sum", label_smoothing=self.cfg.label_smoothing
        )

    def agree(self, lr: float) -> None:
        """Collective, before the update. FloatingPointError on all ranks if a loss is not finite."""
        self.watch.check(self.meter.loss, self.state.step, lr)

    def end_iteration(self) -> None:
        """After the update."""
        self.state.step += 1
        self.meter.end_iteration()

    def end_epoch(self, epoch: int, error: float) -> None:
        """After the evaluation."""
        self.state.errors[epoch] = error
        self.state.evaluated = self.state.step
        if self.cfg.bn_statistics == "recomputed":
            self.state.recomputed = self.evaluator.statistics()

    def between_iterations(self) -> None:
        """Collective: save when it is time to; Interrupted on all ranks when one was asked to stop."""
        self.watch.stop_if_asked()
        every = self.cfg.checkpoint_every
        if every and self.state.step % every == 0:
            self.save()

    @contextmanager
    def saving_when_interrupted(self) -> Iterator[None]:
        """Ranks are interrupted where they have just agreed on it, so all of them come here."""
        try:
            yield
        except Interrupted as request:
            self.save()
            request.step = self.state.step
            raise

    def save(self) -> None:
        """Collective: write the checkpoint, and drop those that are too old."""
        content = checkpoint.collect(
            self.state,
            resume.identity(self.cfg, self.k, self.dataset.fingerprint, self.comm),
            self.comm,
            torn=self.aggregator.torn,
            plan=resume.plan(self.cfg, self.aggregator, self.plan),
        )
        by_rank_0(self.comm, lambda: self.run.store(content, self.cfg.keep))


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
    model = models.build(cfg.model, dataset.num_classes, cfg.zero_gamma, dataset.shape[0])
    precision = Precision(cfg, choose_device(cfg.device, comm))
    model = precision.place(model)
    resumed = resume.find(cfg, k, dataset.fingerprint, comm)
    cfg = resume.pinned(cfg, resumed)
    run = rundir.open_run(cfg, comm, resumed.path if resumed else None)

    watch = Watch(comm)
    evaluator = Evaluator(model, comm, dataset.test, precision, watch)
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
    sums = torch.zeros(3, dtype=torch.float64, device=precision.device)
    state = checkpoint.TrainState(model, optimizer, sums=sums, scaler=precision.scaler)
    if resumed:  # after the aggregator, which gives every rank the buffers of rank 0
        checkpoint.restore(state, resumed.content, comm)
    precision.compile(model)  # last: the evaluator's copy runs as it is
    last = min(schedule.total, cfg.max_steps or schedule.total)
    return Job(
        cfg=cfg,
        comm=comm,
        dataset=dataset,
        k=k,
        steps=steps,
        last=last,
        schedule=schedule,
        state=state,
        aggregator=aggregator,
        evaluator=evaluator,
        meter=Meter(comm, aggregator, minibatch, sums),
        precision=precision,
        watch=watch,
        run=run,
        notices=resumed.notices if resumed else (),
        plan=resumed.content["plan"] if resumed else {},
        traced=to_trace(cfg.profile, state.step, last),
    )
