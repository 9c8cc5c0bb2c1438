"""The training loop (PAPER 1.10). Measuring and logging stand outside the step."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pyallreduce as par
from train.config import Config
from train.evaluate import Evaluation
from train.job import prepare
from train.recipe import set_lr
from train.runlog import RunLog


def train(cfg: Config, comm: par.Communicator) -> dict[str, Any]:
    """Train, evaluate, leave a run directory; returns the summary, whose accuracy all ranks share.

    Collective. UsageError when the configuration does not fit the data, the processes or the
    checkpoint; FloatingPointError when the loss is not finite; Interrupted, with a checkpoint, when
    a rank was asked to stop.
    """
    job = prepare(cfg, comm)
    state, model, optimizer = job.state, job.state.model, job.state.optimizer
    scaler = state.scaler  # does nothing unless the precision is fp16
    evaluation: Evaluation | None = None
    with closing(job.aggregator), RunLog(job) as log, job.saving_when_interrupted():
        while (epoch := job.epoch) is not None:
            model.train()
            for minibatch in job.minibatches(epoch):  # kn images over all workers
                lr = set_lr(optimizer, job.schedule, state.step)
                for images, labels in minibatch:  # one worker's n: several only if virtual
                    with job.precision.autocast():
                        logits = model(images)
                    loss = job.loss(logits, labels) / minibatch.total  # 1/(kn) in all: Remark 3
                    scaler.scale(loss).backward()  # buckets are summed over workers as they fill
                    job.meter.add(loss, logits, labels, minibatch.total)
                job.agree(lr)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=False)  # gradients stay in their buckets
                job.end_iteration()
                log.iteration(lr)
                job.between_iterations()

            evaluation = job.evaluate()
            job.end_epoch(epoch, evaluation.error)
            log.epoch(epoch, job.schedule(state.step - 1), job.meter.end_epoch(), evaluation)
            job.save()
        return log.finish(evaluation or job.evaluate())
