"""ResNet-50 on one GPU at world size 1: what DDP's hooks and ours cost a step, and what the update costs.

bf16 autocast, channels_last, synthetic images that stay on the GPU. Ways take turns in blocks; one row per batch size
with images per second from the median step (event to event on the GPU), and one row with the host's time: from an idle
GPU until forward, backward and update have been queued. ``--dry-run``: small, on the CPU, with gloo.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pyallreduce as par
from benchmarks.gpu.program import emit, seconds_left, skip

RATE, MOMENTUM, DECAY = 0.01, 0.9, 1e-4
PLAIN, DDP = "plain module + torch fused SGD", "DDP (nccl) + torch fused SGD"
HOOK = "DDP (our hook) + torch fused SGD"
STEP, EAGER = "aggregator + par.SGD", "aggregator, eager"
WAYS = (PLAIN, DDP, HOOK, STEP, EAGER)
HOST_SHARE = 1.05  # bar: our host time, of DDP's
HOST_OF_STEP = 0.02  # and of the step with few images
PHASES = ("forward", "backward", "update")
STEADY_S = 4.0  # a batch size is not begun with less time left


@dataclass(frozen=True)
class Plan:
    """``warmup`` lets cuDNN choose its algorithms. ``bf16``: not for CPUs, most of which emulate it."""

    device: str
    backend: str
    batches: tuple[int, ...]
    pixels: int
    warmup: int
    blocks: int
    steps: int  # of a block
    bf16: bool
    model: str


REAL = Plan(
    "cuda", "nccl", (32, 256), 224, warmup=8, blocks=7, steps=10, bf16=True, model="resnet50"
)
DRY = Plan("cpu", "gloo", (4,), 32, warmup=1, blocks=1, steps=1, bf16=False, model="resnet18")


# --- one way of training ---------------------------------------------------------------------------------------------


class Way:
    """A network with its optimizer on one fixed batch. All ways begin with the same weights and see the same data."""

    def __init__(self, plan: Plan, batch: int, name: str, comm: par.Communicator) -> None:
        from torchvision.models import get_model

        torch.manual_seed(0)
        shape = (batch, 3, plan.pixels, plan.pixels)
        self._images = torch.randn(shape, device=plan.device).to(memory_format=torch.channels_last)
        self._labels = torch.randint(1000, (batch,), device=plan.device)
        self._module = get_model(plan.model, weights=None).to(
            plan.device, memory_format=torch.channels_last
        )
        self._net: nn.Module = self._module
        params = self._module.parameters()
        self._optimizer: torch.optim.Optimizer
        if name in (STEP, EAGER):
            self._optimizer = par.SGD(params, RATE, MOMENTUM, DECAY, nesterov=True)
            update = "eager" if name == EAGER else "step"
            self._aggregator = par.GradientAggregator(
                self._module, comm, optimizer=self._optimizer, update=update, check_every=0
            )
        else:
            self._optimizer = torch.optim.SGD(
                params, RATE, MOMENTUM, weight_decay=DECAY, nesterov=True, fused=True
            )
            if name != PLAIN:
                self._net = DistributedDataParallel(self._module)
            if name == HOOK:
                self._net.register_comm_hook(comm, par.allreduce_hook)
        self._autocast = torch.autocast(plan.device, torch.bfloat16, enabled=plan.bf16)
        self.losses: list[torch.Tensor] = []

    def step(self, mark: Callable[[], Any]) -> list[Any]:
        """What ``mark`` returned before, between and after PHASES."""
        marks = [mark()]
        with self._autocast:
            loss = nn.functional.cross_entropy(self._net(self._images), self._labels)
        marks.append(mark())
        loss.backward()
        marks.append(mark())
        self._optimizer.step()
        marks.append(mark())
        self._optimizer.zero_grad(set_to_none=not isinstance(self._optimizer, par.SGD))
        self.losses.append(loss.detach())
        return marks


# --- clocks ----------------------------------------------------------------------------------------------------------


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def host_ms(way: Way, steps: int, device: str) -> list[list[float]]:
    """By step and phase: how long the calls took that queue it. The GPU is idle when a step begins: as long as a step's
    launches fit into its queue (1024), the host waits for nothing."""
    found = []
    for _ in range(steps):
        _wait(device)
        times = way.step(time.perf_counter)
        found.append([(b - a) * 1e3 for a, b in itertools.pairwise(times)])
    _wait(device)
    return found


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def device_ms(way: Way, steps: int, device: str) -> tuple[list[float], list[float]]:
    """Milliseconds of whole steps, begin to begin, and of their updates. On the GPU by events on its stream: the host
    runs ahead, as in training."""
    if device == "cpu":
        times = [way.step(time.perf_counter) for _ in range(steps)]
        return [(t[-1] - t[0]) * 1e3 for t in times], [(t[-1] - t[-2]) * 1e3 for t in times]
    marks = [way.step(_event) for _ in range(steps)]
    end = _event()
    torch.cuda.synchronize()
    begins = [m[0] for m in marks] + [end]
    whole = [a.elapsed_time(b) for a, b in itertools.pairwise(begins)]
    return whole, [m[-2].elapsed_time(m[-1]) for m in marks]


# --- all ways --------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """Of one way, block by block; milliseconds."""

    steps: list[list[float]] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)
    host: list[list[float]] = field(default_factory=list)  # by step, then phase

    def as_json(self, batch: int) -> dict[str, Any]:
        every = [ms for block in self.steps for ms in block]
        step_ms, update_ms = statistics.median(every), statistics.median(self.updates)
        host = [statistics.median(phase) for phase in zip(*self.host, strict=True)]
        return {
            "images_per_s": round(batch / step_ms * 1e3, 1),
            "step_ms": round(step_ms, 4),
            "block_medians_ms": [round(statistics.median(block), 4) for block in self.steps],
            "update_ms": round(update_ms, 4),
            "update_share": round(update_ms / step_ms, 5),
            "host_ms": {p: round(ms, 4) for p, ms in zip(PHASES, host, strict=True)},
        }


def paired_ms(way: list[list[float]], base: list[list[float]]) -> float:
    """Median over blocks of how much longer a step of ``way`` takes than one of ``base`` in the same block."""
    pairs = zip(way, base, strict=True)
    return statistics.median(statistics.median(a) - statistics.median(b) for a, b in pairs)


def _sum(phases: list[list[float]], names: tuple[str, ...]) -> list[float]:
    return [sum(step[PHASES.index(name)] for name in names) for step in phases]


def measure(plan: Plan, batch: int, comm: par.Communicator) -> dict[str, Any]:
    """The row of one batch size."""
    ways = {name: Way(plan, batch, name, comm) for name in WAYS}
    found = {name: Found() for name in ways}
    host_blocks: dict[str, list[list[float]]] = {name: [] for name in ways}
    for way in ways.values():
        for _ in range(plan.warmup):
            way.step(time.perf_counter)
        _wait(plan.device)
    turns = list(ways.items())
    for block in range(plan.blocks):
        for name, way in turns if block % 2 else reversed(turns):
            steps, updates = device_ms(way, plan.steps, plan.device)
            found[name].steps.append(steps)
            found[name].updates += updates
            host = host_ms(way, plan.steps, plan.device)
            found[name].host += host
            host_blocks[name].append(_sum(host, ("forward", "backward")))
    losses = {name: [round(float(x), 4) for x in way.losses[:3]] for name, way in ways.items()}
    finite = {name: bool(torch.stack(way.losses).isfinite().all()) for name, way in ways.items()}
    return {
        "model": plan.model,
        "world_size": 1,
        "batch": batch,
        "pixels": plan.pixels,
        "ways": {name: f.as_json(batch) for name, f in found.items()},
        "added_ms": {
            name: {
                "step": round(paired_ms(found[name].steps, found[PLAIN].steps), 4),
                "host": round(paired_ms(host_blocks[name], host_blocks[PLAIN]), 4),
            }
            for name in WAYS
            if name != PLAIN
        },
        "losses": losses,
        "finite": finite,
    }


def agree(row: dict[str, Any]) -> bool:
    """World size 1: all ways compute what the module alone does, up to the order of sums in bf16."""
    plain = row["losses"][PLAIN]
    close = all(
        abs(a - b) <= 0.02 * abs(a)
        for losses in row["losses"].values()
        for a, b in zip(plain, losses, strict=True)
    )
    return close and all(row["finite"].values())


def bars(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Each: what, value, at_most. Bars are of the GPU; a dry run has none."""
    batch, ways, added = row["batch"], row["ways"], row["added_ms"]
    found = [
        {
            "bar": f"n = {batch}, {name}: step / DDP's",
            "value": ways[name]["step_ms"] / ways[DDP]["step_ms"],
            "at_most": 1.0,
        }
        for name in (STEP, EAGER)
    ]
    ours, ddp = added[STEP]["host"], added[DDP]["host"]
    found.append(
        {"bar": f"n = {batch}, host time of our hooks / DDP's", "value": ours / ddp}
        | {"at_most": HOST_SHARE}
    )
    if batch == 32:
        share = ours / ways[STEP]["step_ms"]
        found.append({"bar": f"n = {batch}, host time of our hooks / step", "value": share})
        found[-1]["at_most"] = HOST_OF_STEP
    for bar in found:
        bar |= {"value": round(bar["value"], 4), "met": bar["value"] <= bar["at_most"]}
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    plan = DRY if parser.parse_args().dry_run else REAL
    try:
        import torchvision  # noqa: F401
    except ImportError:
        skip("no torchvision, where ResNet-50 comes from")
    torch.backends.cudnn.benchmark = True
    if plan is DRY:
        torch.set_num_threads(1)  # other programs need the cores, too
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        options = {"device_id": torch.device("cuda", 0)} if plan.device == "cuda" else {}
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group(plan.backend, store=store, rank=0, world_size=1, **options)
        comm = par.init(store=dist.PrefixStore("ours", store), rank=0, size=1)
        for batch in plan.batches:
            if seconds_left() < STEADY_S:
                emit(model=plan.model, batch=batch, untried=f"{seconds_left():.0f} s are left")
                continue
            rows.append(measure(plan, batch, comm))
            emit(**rows[-1])
            for bar in bars(rows[-1]) if plan is REAL else []:
                emit(**bar)
        comm.close()
        dist.destroy_process_group()
    for row in rows:
        if not agree(row):
            print(f"the ways' losses differ, or are not finite: {row['losses']}")
            return 1
    words = [
        f"n = {row['batch']}: DDP {row['ways'][DDP]['images_per_s']:.0f}, "
        f"eager {row['ways'][EAGER]['images_per_s']:.0f} images/s"
        for row in rows
    ]
    emit(says="; ".join(words))
    return 0


if __name__ == "__main__":
    sys.exit(main())
