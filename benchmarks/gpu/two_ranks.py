"""Two ranks train ResNet-50 on one GPU, by the aggregator and by DDP with our hook: gradients against those of one
process, and how much communication was hidden.

NCCL takes the ranks for two hosts and goes through sockets (benchmarks/gpu/ranks.py), and the ranks take turns on the
GPU: the times say how well the instruments work, and nothing about a machine with a GPU per rank. Passes if the ranks
hold the same bits and the gradients are those of one process. ``--dry-run``: a small network on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.program import emit, seconds_left, skip
from benchmarks.gpu.ranks import GLOO, HOSTS, last_words, run_ranks

SIZE = 2
ITERATIONS = 8
IMAGES = 8
RATE = 0.01
# Of the largest element, in float32: two processes' convolutions may add up in other orders.
TOLERANCE = 2e-3
MODES = ("aggregator", "aggregator, eager", "DDP with our hook")


def _network(device: str) -> Any:
    import torch

    torch.manual_seed(0)
    if device == "cpu":
        net: Any = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(576, 10)
        )
        return net
    from torchvision.models import resnet50

    return resnet50(weights=None).to(device, memory_format=torch.channels_last)


def _loss(net: Any, rank: int, step: int, device: str) -> Any:
    import torch

    torch.manual_seed(1000 * rank + step)
    pixels = 8 if device == "cpu" else 224
    images = torch.randn(IMAGES, 3, pixels, pixels, device=device)
    labels = torch.randint(10, (IMAGES,), device=device)
    return torch.nn.functional.cross_entropy(net(images), labels)


def _reference(device: str) -> list[Any]:
    """Weights after one step with the mean of both ranks' gradients."""
    import torch

    net = _network(device)
    optimizer = torch.optim.SGD(net.parameters(), RATE, 0.9, weight_decay=1e-4, nesterov=True)
    for rank in range(SIZE):
        (_loss(net, rank, 0, device) / SIZE).backward()
    optimizer.step()
    return [param.detach() for param in net.parameters()]


class Training:
    def __init__(self, mode: str, comm: Any, device: str) -> None:
        import torch

        import pyallreduce as par

        self.net = self._module = _network(device)
        self.aggregator = None
        params = self.net.parameters()
        if mode == "DDP with our hook":
            self.optimizer: Any = torch.optim.SGD(
                params, RATE, 0.9, weight_decay=1e-4, nesterov=True
            )
            self.net = torch.nn.parallel.DistributedDataParallel(self.net)
            self.net.register_comm_hook(comm, par.allreduce_hook)
        else:
            self.optimizer = par.SGD(params, RATE, 0.9, 1e-4, nesterov=True)
            self.aggregator = par.GradientAggregator(
                self.net,
                comm,
                optimizer=self.optimizer,
                update="eager" if mode.endswith("eager") else "step",
            )

    def step(self, rank: int, step: int, device: str) -> None:
        _loss(self.net, rank, step, device).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def weights(self) -> list[Any]:
        return [param.detach() for param in self._module.parameters()]


def _error(weights: list[Any], right: list[Any]) -> float:
    """Of the update: the largest difference, as a part of the largest change of that parameter's weights."""
    start = _network(right[0].device.type)
    worst = 0.0
    for ours, theirs, before in zip(weights, right, start.parameters(), strict=True):
        change = float((theirs - before).abs().max())
        worst = max(worst, float((ours - theirs).abs().max()) / max(change, 1e-12))
    return worst


def _rows(rank: int, comm: Any, device: str) -> Iterator[dict[str, Any]]:
    import torch

    right = _reference(device)
    for mode in MODES:
        training = Training(mode, comm, device)
        training.step(rank, 0, device)
        error = _error(training.weights(), right)
        reports, times = [], []
        for step in range(1, ITERATIONS + 1):
            begin = time.perf_counter()
            training.step(rank, step, device)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
            if training.aggregator is not None:
                reports.append(training.aggregator.report())
        flat = torch.cat([w.flatten() for w in training.weights()])
        of_all = torch.empty(SIZE * flat.numel(), device=flat.device)
        comm.all_gather(of_all, flat)
        row = {
            "mode": mode,
            "error": round(error, 6),
            "same_bits": bool(torch.equal(*of_all.view(SIZE, -1))),
            "step_ms": round(statistics.median(times) * 1e3, 3),
        }
        for name in ("overlap_ratio", "exposed_comm_s", "comm_busy_s", "window_s"):
            values = [r[name] for r in reports if r[name] is not None]
            row[name] = round(statistics.median(values), 6) if values else None
        row["last_iteration"] = reports[-1]["iteration"] if reports else None
        yield row
        if training.aggregator is not None:
            training.aggregator.close()


def run_rank(rank: int, device: str, folder: str) -> None:
    import torch
    import torch.distributed as dist

    import pyallreduce as par

    if device == "cuda":
        torch.cuda.set_device(0)
        torch.backends.cudnn.deterministic = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    else:
        torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    comm = par.init(30.0, store=dist.PrefixStore("ours", store), rank=rank, size=SIZE)
    for row in _rows(rank, comm, device):
        emit(**row)
    comm.close()
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--rank", type=int, help="be this rank; started by the program itself")
    parser.add_argument("--size", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder")
    given = parser.parse_args()
    if given.rank is not None:
        run_rank(given.rank, given.device, given.folder)
        return 0
    if importlib.util.find_spec("torchvision") is None:  # not imported: only the ranks need it
        skip("no torchvision, where ResNet-50 comes from")
    device = "cpu" if given.dry_run else "cuda"
    arguments = ["-m", "benchmarks.gpu.two_ranks", "--device", device]
    way = GLOO if given.dry_run else HOSTS
    with tempfile.TemporaryDirectory() as folder:
        codes, texts = run_ranks(way, SIZE, arguments, folder, max(seconds_left() - 2, 1))
    found = [
        [json.loads(line) for line in text.splitlines() if line.startswith('{"mode"')]
        for text in texts
    ]
    for row in found[0]:
        emit(**row)
    if any(codes) or None in codes:
        failing = next(i for i, code in enumerate(codes) if code != 0)
        print(last_words(texts[failing]))
        emit(says=f"rank {failing} failed: {last_words(texts[failing])[-200:]}")
        return 1
    wrong = [row["mode"] for row in found[0] if not row["same_bits"] or row["error"] > TOLERANCE]
    words = [
        f"{row['mode']}: overlap {row['overlap_ratio']:.0%}"
        for row in found[0]
        if row["overlap_ratio"] is not None
    ]
    emit(says="WRONG: " + ", ".join(wrong) if wrong else "; ".join(words))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
