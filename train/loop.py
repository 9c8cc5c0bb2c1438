"""The training loop (PAPER 1.10). Measuring and logging stand outside the step."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from torch.nn.functional import cross_entropy

import pyallreduce as par
from train.config import Config
from train.job import prepare
from train.recipe import set_lr
from train.runlog import RunLog


def train(cfg: Config, comm: par.Communicator) -> dict[str, Any]:
    """Train, evaluate, leave a run directory; returns the summary, whose accuracy all ranks share.

    Collective. UsageError when the configuration does not fit the data, the processes or the
    checkpoint; FloatingPointError when the loss is not finite.
    """
    job = prepare(cfg, comm)
    state, model, optimizer = job.state, job.state.model, job.state.optimizer
    evaluation = job.evaluate(model)
    with closing(job.aggregator), closing(RunLog(job)) as log:
        while state.step < job.last:
            epoch = state.step // job.steps
            model.train()
            for images, labels in job.meter.timed(job.batches(epoch)):
                lr = set_lr(optimizer, job.schedule, state.step)
                logits = model(images)
                loss = cross_entropy(logits, labels) / comm.size  # 1/(kn) in all: Remark 3
                loss.backward()  # buckets are summed over the workers as they fill
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)  # gradients stay in their buckets
                state.step += 1

                job.meter.add(loss, logits, labels)
                log.iteration(lr)

            training, evaluation = job.meter.end_epoch(), job.evaluate(model)
            state.errors[epoch] = evaluation.error
            log.epoch(epoch, lr, training, evaluation)
            job.save()
        return log.finish(evaluation)
