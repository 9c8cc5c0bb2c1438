"""Everything a run tells: header, log lines, records, the summary, the pictures. Rank 0 speaks."""

from __future__ import annotations

import dataclasses
import os
import sys
from types import TracebackType
from typing import Any, Self

import torch

from train import launch, progress, report
from train.config import Config
from train.evaluate import Evaluation
from train.job import Job
from train.metrics import METRICS, MetricsFile
from train.recipe import median_error
from train.records import CONFIG, ENVIRONMENT, TIMELINE, Records
from train.rundir import environment
from train.watch import Interrupted

LOG = "log.txt"


class RunLog:
    """Follows one call of `train` as a context: whatever ends it, the report is written."""

    def __init__(self, job: Job) -> None:
        self._job, self._run = job, job.run
        self._root = job.comm.rank == 0
        self._metrics = MetricsFile(
            self._run.path and self._run.file(METRICS), job.state.step, job.state.evaluated
        )
        self._evaluated = False
        self._tells_top5 = job.dataset.num_classes > 5  # of fewer, five are all
        derived = {
            "processes": job.comm.size,
            "workers": job.k,
            "minibatch": job.minibatch,
            "iterations_per_epoch": job.steps,
            "schedule": dataclasses.asdict(job.schedule),
        }
        stream = sys.stderr if job.cfg.json else sys.stdout
        self._progress = progress.make_progress(job.comm.rank, job.last, stream)
        self._file = None
        if self._root:
            self._run.write_json(CONFIG, {**job.cfg.to_json(), "derived": derived})
            self._run.write_json(ENVIRONMENT, environment(job.comm))
            self._file = open(self._run.file(LOG), "a", encoding="utf-8")  # noqa: SIM115 - see __exit__
            self._progress = progress.Kept(self._progress, self._file)
        for line in self._header() if self._root else ():
            self._progress.line(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leaves the terminal in order, and the report of what there was before an error."""
        self._progress.close()
        if error is not None and self._root:
            reason, step = f"{type(error).__name__}: {error}", self._job.state.step
            self._metrics.write("stopped", step=step, reason=reason)
            self._progress.line(f"stopped    at iteration {step} of {self._job.last}: {reason}")
            # Whoever sent the signal kills in a while, and the other ranks wait.
            self._report(in_a_hurry=isinstance(error, Interrupted))
        self._metrics.close()
        if self._file:
            self._file.close()

    def iteration(self, lr: float) -> None:
        """After each iteration; costs a comparison and, on a terminal, a bar."""
        job, step = self._job, self._job.state.step
        if not self._root:
            return
        if step % job.cfg.print_freq and step != job.last:
            self._progress.advance(step)
            return
        epoch, done = divmod(step - 1, job.steps)
        numbers = job.meter.recent()
        eta_s = (job.last - step) * job.meter.median_iteration_s()
        line = progress.log_line(epoch + 1, job.cfg.epochs, done + 1, job.steps, lr, eta_s, numbers)
        self._progress.advance(step, line)
        self._metrics.write("step", step=step, epoch=epoch, lr=lr, **numbers)

    def epoch(self, epoch: int, lr: float, training: dict[str, Any], test: Evaluation) -> None:
        self._evaluated = True
        self._metrics.write(
            "epoch",
            step=self._job.state.step,
            epoch=epoch,
            iterations_per_epoch=self._job.steps,
            lr=lr,
            **training,
            test_error=test.error,
            **({"test_error_top5": test.error5} if self._tells_top5 else {}),
            test_loss=test.loss,
            test_images=test.count,
            bn_statistics=test.statistics,
        )
        self._progress.line(
            f"epoch {epoch + 1}/{self._job.cfg.epochs}  train loss {training['train_loss']:.4f} "
            f"error {training['train_error']:.2f} %  held-out error {test.error:.2f} % "
            + (f"top-5 {test.error5:.2f} % " if self._tells_top5 else "")
            + f"({test.count} images)  {progress.clock(self._metrics.wall_s)}"
        )
        if self._root:
            report.write_summary(Records.read(self._run.file(".")))

    def finish(self, test: Evaluation) -> dict[str, Any]:
        """Write the summary and the pictures; the summary has the same accuracy on every rank."""
        job = self._job
        before = {} if job.cfg.test_only else job.state.errors
        errors = [error for _, error in sorted(before.items())] or [test.error]
        trained = job.meter.steps > 0
        summary = {
            "step": job.state.step,
            "accuracy_median": 100.0 - median_error(errors),
            "accuracy_epochs": min(len(errors), 5),
            "accuracy_final": test.accuracy,
            "accuracy_final_top5": 100.0 - test.error5 if self._tells_top5 else None,
            "test_images": test.count,
            "bn_statistics": test.statistics,
            "processes": job.comm.size,
            "cores": _cores(),
            "seconds": self._metrics.wall_s,
            "throughput": job.meter.throughput() if trained else None,
            "communication": job.meter.communication() if trained and self._root else None,
            "directory": str(self._run.path) if self._root else None,
        }
        if trained or self._evaluated or job.cfg.test_only:
            self._metrics.write("summary", **summary)
        self._progress.close()
        if (trained or self._evaluated) and self._root:
            self._report()
        for line in _summary_lines(summary) if self._root else ():
            self._progress.line(line)
        return summary

    def _report(self, in_a_hurry: bool = False) -> None:
        """Pictures and pages. Nothing here decides how the run ends: that is decided already.

        A launcher may lose patience with the last rank, and so may a person: then without pictures.
        """
        if self._job.meter.steps:
            self._run.write_json(TIMELINE, self._job.meter.typical_report())
        if not self._job.cfg.report:
            return
        try:
            missing = report.write(self._run.file("."), in_a_hurry)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            missing = f"{type(error).__name__}: {error}"
        if missing:
            self._progress.line(
                f"pictures   missing ({missing}); python -m train report {self._run.path}"
            )

    def _header(self) -> list[str]:
        job = self._job
        cfg, comm, schedule = job.cfg, job.comm, job.schedule
        if schedule.warmup:
            way = "over" if schedule.gradual else "at once after"
            rate = f"{schedule.start:g} -> {schedule.peak:g} {way} {schedule.warmup} iterations"
        else:
            rate = f"{schedule.peak:g}, no warmup"
        drops = ", ".join(str(d // job.steps) for d in schedule.drops) or "none"
        parameters = sum(p.numel() for p in job.state.model.parameters())
        lines = [
            f"train      {cfg.preset}: {cfg.model}, {parameters:,} parameters; "
            f"{_count(comm.size, 'process', 'processes')} on {_count(comm.num_nodes, 'host')}"
            + (f" by {launcher}, " if (launcher := launch.launched_by(os.environ)) else ", ")
            + f"{_count(_cores(), 'core')}, {_count(torch.get_num_threads(), 'thread')} each",
            f"data       {cfg.dataset}: {job.dataset.description}",
            f"recipe     minibatch {job.k} x {cfg.batch_size} = {job.minibatch} "
            f"(reference {cfg.reference_minibatch}), {job.steps} iterations per epoch"
            + (f"; {job.k} virtual workers" if job.k > comm.size else ""),
            f"           learning rate {rate} ({cfg.lr_rule} rule); x0.1 at epochs {drops} of "
            f"{cfg.epochs}",
            f"           {_update_rule(cfg)}",
            f"computing  {job.precision}",
            "evaluation every held-out image once, batch norm by "
            + {
                "worker0": "worker 0's running statistics",
                "recomputed": f"statistics recomputed over {cfg.bn_images} training images",
            }[cfg.bn_statistics],
            f"run        {self._run.path}",
        ]
        if self._run.resumed_from:
            done = "" if job.state.step < job.last else "; nothing left to do"
            done = "; only to be evaluated" if cfg.test_only else done
            lines.append(
                f"resumed    {self._run.resumed_from} at iteration {job.state.step} of "
                f"{job.last}{done}"
            )
            lines += [f"           {notice}" for notice in job.notices]
        return lines


def _update_rule(cfg: Config) -> str:
    correction = "" if cfg.momentum_form == "reference" or cfg.momentum_correction else "un"
    form = {"reference": "u = m u + g", "absorbed": f"v = m v + lr g, {correction}corrected"}
    return (
        f"{'Nesterov ' if cfg.nesterov else ''}momentum {cfg.momentum:g} ({form[cfg.momentum_form]}), "
        f"weight decay {cfg.weight_decay:g} but none on batch norm, last gamma of a block "
        f"{0 if cfg.zero_gamma else 1}"
    )


def _summary_lines(s: dict[str, Any]) -> list[str]:
    lines = [
        f"accuracy      {s['accuracy_median']:.2f} % held out, median of the last "
        f"{s['accuracy_epochs']} epochs; {s['accuracy_final']:.2f} % at the end "
        + (f"(top-5 {top5:.2f} %; " if (top5 := s["accuracy_final_top5"]) is not None else "(")
        + f"{s['test_images']} images, {s['bn_statistics']})"
    ]
    if s["throughput"]:
        lines.append(
            f"speed         {s['throughput']['images_per_s']:,.0f} images/s in the median "
            f"iteration, {s['throughput']['images_per_s_end_to_end']:,.0f} images/s end to end "
            f"({s['seconds']:.1f} s in all)"
        )
        lines.append("communication " + _communication_line(s["communication"], s["cores"]))
    lines.append(f"files         {s['directory']}: {', '.join(sorted(os.listdir(s['directory'])))}")
    return lines


def _communication_line(c: dict[str, Any], cores: int) -> str:
    if c["overlap_ratio"] is None:
        return "none: one process"
    return (
        f"{100 * c['overlap_ratio']:.0f} % hidden behind compute (overlap ratio "
        f"{c['overlap_ratio']:.2f}), {c['exposed_ms']:.2f} ms exposed per iteration of "
        f"{c['busy_ms']:.2f} ms busy, medians of {c['iterations']} iterations on {cores} cores"
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
