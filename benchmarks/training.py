"""Ways to train one model on the ranks of a host, step by step; and the source that asks the ranks for steps."""

from __future__ import annotations

import gc
import itertools
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

import pyallreduce as par
from benchmarks.harness import Block, Samples
from benchmarks.peers import RankSet
from benchmarks.rank import Rank

PIXELS, CLASSES = 64, 1000
RATE, MOMENTUM, DECAY = 1e-4, 0.9, 1e-4
NO_COMMUNICATION = "DDP, no communication"
ALONE = ("plain", NO_COMMUNICATION)  # ways in which every rank trains a module of its own
PHASES = ("forward", "backward", "update", "zero")


def _mlp() -> nn.Module:
    """3 x 1024: 9 MB of parameters and hardly any compute; nothing to hide communication behind."""
    widths = [3 * PIXELS * PIXELS // 16, 1024, 1024]
    layers: list[nn.Module] = [nn.AvgPool2d(4), nn.Flatten()]
    for width, following in zip(widths, [*widths[1:], 1024], strict=True):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1024, CLASSES))


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        model: nn.Module = getattr(torchvision.models, name)(weights=None)
        return model

    return make


MODELS = {"mlp": _mlp, **{name: _torchvision(name) for name in ("resnet18", "resnet50", "vgg11")}}


# --- ways to train, in the ranks' processes --------------------------------------------------------------------------


@dataclass
class Way:
    """What a step calls. ``net`` is the module or DDP around it. Without ``optimizer`` a step is forward and backward;
    the gradients are let go off the clock."""

    module: nn.Module
    net: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    set_to_none: bool = True  # how gradients are zeroed; users' default
    aggregator: par.GradientAggregator | None = None


def _torch_sgd(module: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        module.parameters(), RATE, MOMENTUM, weight_decay=DECAY, nesterov=True, **options
    )


def plain(rank: Rank, module: nn.Module) -> Way:
    return Way(module, module)


def ddp(rank: Rank, module: nn.Module) -> Way:
    return Way(module, DistributedDataParallel(module), _torch_sgd(module))


def ddp_fused(rank: Rank, module: nn.Module) -> Way:
    return Way(module, DistributedDataParallel(module), _torch_sgd(module, fused=True))


def ddp_hook(rank: Rank, module: nn.Module) -> Way:
    net = DistributedDataParallel(module)
    net.register_comm_hook(rank.comm, par.allreduce_hook)
    return Way(module, net, _torch_sgd(module))


def ddp_alone(rank: Rank, module: nn.Module) -> Way:
    """A floor: DDP's own work, and no communication. No rank waits for another."""
    net = DistributedDataParallel(module)
    net.register_comm_hook(None, done_at_once)
    return Way(module, net, _torch_sgd(module))


def done_at_once(state: Any, bucket: dist.GradBucket) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(bucket.buffer())
    return future


# DDP reads annotations, and knows these only as objects.
done_at_once.__annotations__.update(bucket=dist.GradBucket, **{"return": Future[torch.Tensor]})


def _aggregated(rank: Rank, module: nn.Module, **options: Any) -> Way:
    optimizer = par.SGD(module.parameters(), RATE, MOMENTUM, DECAY, nesterov=True)
    aggregator = par.GradientAggregator(module, rank.comm, optimizer=optimizer, **options)
    return Way(module, module, optimizer, set_to_none=False, aggregator=aggregator)


def step(rank: Rank, module: nn.Module) -> Way:
    return _aggregated(rank, module)


def eager(rank: Rank, module: nn.Module) -> Way:
    return _aggregated(rank, module, update="eager")


def eager_shared(rank: Rank, module: nn.Module) -> Way:
    return _aggregated(rank, module, update="eager", share_parameters=True)


WAYS = {
    "plain": plain,
    "DDP (gloo)": ddp,
    "DDP (gloo), fused SGD": ddp_fused,
    "DDP + our hook": ddp_hook,
    NO_COMMUNICATION: ddp_alone,
    "aggregator, step": step,
    "aggregator, eager": eager,
    "aggregator, eager, shared": eager_shared,
}


class Trainer:
    """One way to train one model on one fixed batch, with a clock between the phases."""

    def __init__(self, rank: Rank, way: Way, batch: int) -> None:
        generator = torch.Generator().manual_seed(rank.rank)
        self._images = torch.randn(batch, 3, PIXELS, PIXELS, generator=generator)
        self._labels = torch.randint(CLASSES, (batch,), generator=generator)
        self._rank = rank
        self.way = way

    def step(self, index: int) -> tuple[list[float], float]:
        """When each of PHASES began and the last ended, in seconds of time.perf_counter; and the loss."""
        way = self.way
        torch.manual_seed(index * self._rank.size + self._rank.rank)  # of dropout
        self._rank.comm.barrier()
        times = [time.perf_counter()]
        loss = nn.functional.cross_entropy(way.net(self._images), self._labels)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        if way.optimizer is None:
            way.module.zero_grad()
        else:
            way.optimizer.step()
            times.append(time.perf_counter())
            way.optimizer.zero_grad(way.set_to_none)
            times.append(time.perf_counter())
        return times, float(loss.detach())

    def close(self) -> None:
        if self.way.aggregator is not None:
            self.way.aggregator.close()


def digest_of(module: nn.Module) -> int:
    """Changes with any bit of any parameter."""
    return sum(
        int(p.detach().view(torch.int32).sum(dtype=torch.int64)) for p in module.parameters()
    )


def build(rank: Rank, model: str, name: str, batch: int) -> str | None:
    """Makes a way of training; None, or why this version has it not."""
    torch.manual_seed(0)
    module = MODELS[model]()
    try:
        way = WAYS[name](rank, module)
    except par.UsageError as error:  # raised before anything is sent, on all ranks
        return str(error)
    rank.kept.setdefault("trainers", {})[name] = Trainer(rank, way, batch)
    return None


def discard(rank: Rank) -> None:
    trainers = rank.kept.pop("trainers", {})
    while trainers:
        trainers.popitem()[1].close()
    gc.collect()


@dataclass
class Steps:
    """What a rank has to say about some steps of one way."""

    phases: list[list[float]]  # by step, then phase; seconds
    losses: list[float]
    digest: int  # of the parameters afterwards
    report: dict[str, Any] | None  # the aggregator's, of the last step
    peak_rss_bytes: int


def run_steps(rank: Rank, name: str, steps: int, first: int) -> Steps:
    trainer: Trainer = rank.kept["trainers"][name]
    gc.collect()
    gc.disable()
    try:
        done = [trainer.step(index) for index in range(first, first + steps)]
    finally:
        gc.enable()
    return Steps(
        phases=[[end - start for start, end in itertools.pairwise(times)] for times, _ in done],
        losses=[loss for _, loss in done],
        digest=digest_of(trainer.way.module),
        report=None if trainer.way.aggregator is None else trainer.way.aggregator.report(),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    )


# --- in the coordinator ----------------------------------------------------------------------------------------------


class Training:
    """Some ways to train one model, alive at once, as a source of blocks of steps. ``close`` frees them."""

    def __init__(self, ranks: RankSet, model: str, names: list[str], batch: int) -> None:
        self._ranks = ranks
        self.missing: dict[str, str] = {}
        for name in names:
            (reason, *_) = ranks.call(build, model, name, batch)
            if reason is not None:
                self.missing[name] = reason
        self.methods = tuple(name for name in names if name not in self.missing)
        self.answers: dict[str, list[list[Steps]]] = {name: [] for name in self.methods}

    def block(self, method: str, calls: int, first: int) -> Block:
        start = time.monotonic()
        answers: list[Steps] = self._ranks.call(run_steps, method, calls, first)
        self.answers[method].append(answers)
        by_rank = [[sum(phases) for phases in answer.phases] for answer in answers]
        slowest = [max(step) for step in zip(*by_rank, strict=True)]
        differing = 0 if method in ALONE else len({answer.digest for answer in answers}) - 1
        return Block(slowest, by_rank[0], differing, time.monotonic() - start)

    def first_losses(self) -> dict[str, list[float]]:
        """Of the first steps of each way that trains together, on rank 0: every way starts alike and sees the same
        data."""
        return {
            name: blocks[0][0].losses for name, blocks in self.answers.items() if name not in ALONE
        }

    def phases_us(self, blocks: int) -> dict[str, dict[str, float]]:
        """Medians over the last ``blocks`` blocks, mean over the ranks."""
        found = {}
        for name, answers in self.answers.items():
            steps = [steps.phases for block in answers[-blocks:] for steps in block]
            by_phase = zip(*(phases for rank in steps for phases in rank), strict=True)
            medians = [statistics.median(seconds) * 1e6 for seconds in by_phase]
            found[name] = dict(zip(PHASES, medians, strict=False))  # plain has the first two
        return found

    def exposed_us(self, blocks: int) -> dict[str, float]:
        """Median of what the aggregators report as exposed communication, over ranks and last blocks."""
        reports = {
            name: [steps.report for block in answers[-blocks:] for steps in block if steps.report]
            for name, answers in self.answers.items()
        }
        return {
            name: statistics.median(report["exposed_comm_s"] for report in found) * 1e6
            for name, found in reports.items()
            if found
        }

    def peak_rss_bytes(self) -> int:
        """Of all ranks together, so far."""
        last = [answers[-1] for answers in self.answers.values()]
        return max(sum(steps.peak_rss_bytes for steps in block) for block in last)

    def close(self) -> None:
        self._ranks.call(discard)


def overhead_us(way: Samples, base: Samples) -> float:
    """Median over blocks of how much longer a step of ``way`` takes than one of ``base`` in the same block."""
    pairs = zip(way.blocks, base.blocks, strict=True)
    return statistics.median(statistics.median(a) - statistics.median(b) for a, b in pairs) * 1e6
