"""`python -m train data-bench`: does the loader keep up with the model? One process, its own cores.

Loaders are measured in turns, so that a busy moment of the machine meets all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import count, islice
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import pyallreduce as par
from train import data, models
from train.config import Config, parse
from train.data.files import Files, Reader
from train.data.images import Draw, one_thread
from train.data.sources import Folder
from train.precision import Precision, choose_device, wide

ROUNDS = 3
ROUND_S = 3.0
STAGE_IMAGES = 64

Rate = dict[str, float]


def main(argv: Sequence[str]) -> int:
    """0: measured, whatever the figures are. 2: wrong usage."""
    cfg = parse("data-bench", argv)
    with closing(par.init(timeout_s=cfg.timeout_s)) as comm:
        if comm.size > 1:
            raise par.UsageError(
                f"data-bench: given {comm.size} processes, accepted: one; divide its figures by "
                "the ranks of a host, or give --workers the share of one"
            )
        dataset = data.load(cfg, comm)
        # Before anything is measured: it may not take such images.
        model = models.build(cfg.model, dataset.num_classes, channels=dataset.shape[0])
        precision = Precision(cfg, choose_device(cfg.device, comm))
    print_line = (lambda text: None) if cfg.json else print
    print_line(f"data    {cfg.dataset}: {dataset.description}")
    stages = _stages(dataset.train.reader) if isinstance(dataset.train, Files) else None
    if stages:
        print_line("image   " + _stages_line(stages))
    rates = _in_turns(_loaders(cfg, dataset), _ahead(dataset))
    for name, rate in rates.items():
        print_line(f"{'loader' if name == OURS else 'other':7} {_rate_line(name, rate)}")
    needed = _model_rate(cfg, dataset, model, precision)
    print_line(
        f"model   {cfg.model}, n = {cfg.batch_size}, {precision}: needs {needed:,.1f} images/s"
    )
    print_line(f"verdict {_verdict(rates[OURS]['images_per_s'], needed)}")
    if cfg.json:
        print(
            json.dumps(
                {
                    "schema": 1,
                    "data": dataset.description,
                    "cores": _cores(),
                    "image_ms": stages,
                    "loaders": rates,
                    "model": f"{cfg.model}, n = {cfg.batch_size}, {precision}",
                    "model_images_per_s": needed,
                }
            )
        )
    return 0


OURS = "this trainer"


def _loaders(cfg: Config, dataset: data.Dataset) -> dict[str, Callable[[], Iterable[int]]]:
    """By name: what starts a loader that yields the sizes of its batches, epoch after epoch."""

    def ours() -> Iterator[int]:
        steps = range(data.steps_per_epoch(len(dataset.train), cfg.batch_size))
        for epoch in count():
            for _, labels in data.batches(
                dataset.train,
                seed=cfg.seed,
                epoch=epoch,
                workers=(0,),
                k=1,
                batch_size=cfg.batch_size,
                steps=steps,
            ):
                yield len(labels)

    loaders: dict[str, Callable[[], Iterable[int]]] = {OURS: ours}
    if isinstance(dataset.train, Files) and isinstance(dataset.train.reader.source, Folder):
        loaders["Pillow"] = lambda: _plain(cfg, dataset.train, with_pillow=True)
        loaders["torchvision"] = lambda: _plain(cfg, dataset.train, with_pillow=False)
    return loaders


def _plain(cfg: Config, train: Any, with_pillow: bool) -> Iterator[int]:
    """What one would write with torchvision alone: an ImageFolder, its transforms, a DataLoader."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import InterpolationMode, v2

    normalise = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    crop = v2.RandomResizedCrop(cfg.image_size, interpolation=InterpolationMode.BICUBIC)
    floats = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    loader = {} if with_pillow else {"loader": _torchvision_image}
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), *floats, normalise])
    images = ImageFolder(str(train.reader.source.root), transform, **loader)
    batches: Any = torch.utils.data.DataLoader(
        images,
        cfg.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=train.loading.workers,
        persistent_workers=train.loading.workers > 0,  # as ours are
        prefetch_factor=train.loading.ahead if train.loading.workers else None,
    )
    while True:
        for _, labels in batches:
            yield len(labels)


def _torchvision_image(path: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and what many a script uses
        from torchvision.io import ImageReadMode, decode_image, read_file

        return decode_image(read_file(path), ImageReadMode.RGB)


def _in_turns(loaders: dict[str, Callable[[], Iterable[int]]], ahead: int) -> dict[str, Rate]:
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(ROUNDS):
        for name, start in loaders.items():
            rates[name].append(_images_per_s(start(), ahead))
    cores = _cores()
    return {
        name: {
            "images_per_s": statistics.median(found),
            "lowest": min(found),
            "highest": max(found),
            "per_core": statistics.median(found) / cores,
        }
        for name, found in rates.items()
    }


def _ahead(dataset: data.Dataset) -> int:
    if not isinstance(dataset.train, Files):
        return 0
    loading = dataset.train.loading
    return 2 * loading.workers * loading.ahead


def _images_per_s(sizes: Iterable[int], ahead: int) -> float:
    """For `ROUND_S`, without the first batches, which were prepared before anyone asked."""
    source = islice(sizes, ahead, None)
    next(source)
    started, images = time.perf_counter(), 0
    for size in source:
        images += size
        if time.perf_counter() - started >= ROUND_S:
            break
    return images / (time.perf_counter() - started)


def _stages(reader: Reader) -> Rate:
    """Milliseconds per image on one core, medians over the first images."""
    times: dict[str, list[float]] = {"read": [], "decode": [], "augment": []}
    with one_thread():
        for image in range(min(STAGE_IMAGES, len(reader))):
            marks = [time.perf_counter()]
            packed = reader.source.read(image)
            marks.append(time.perf_counter())
            rgb = reader.decode(packed)
            marks.append(time.perf_counter())
            reader.transform(rgb, Draw(0, 0), image)
            marks.append(time.perf_counter())
            for name, begin, end in zip(times, marks, marks[1:], strict=False):
                times[name].append(1e3 * (end - begin))
    return {name: statistics.median(found) for name, found in times.items()}


def _model_rate(
    cfg: Config, dataset: data.Dataset, model: nn.Module, precision: Precision
) -> float:
    """Images/s of forward, backward and update, the data being there: what the loader must give."""
    device = precision.device
    model = precision.place(model).train()
    precision.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=cfg.lr, momentum=cfg.momentum, nesterov=True)
    labels = torch.arange(cfg.batch_size, device=device) % dataset.num_classes
    noise = torch.randn(cfg.batch_size, *dataset.shape, device=device)
    ((images, labels),) = precision.arranged([(noise, labels)])

    def step() -> float:
        started = time.perf_counter()
        with precision.autocast():
            logits = model(images)
        precision.scaler.scale(cross_entropy(wide(logits), labels)).backward()
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad(set_to_none=False)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    step()
    seconds, end = [step()], time.perf_counter() + ROUND_S
    while time.perf_counter() < end:
        seconds.append(step())
    return cfg.batch_size / statistics.median(seconds)


def _stages_line(stages: Rate) -> str:
    total = sum(stages.values())
    parts = ", ".join(f"{name} {ms:.2f} ms" for name, ms in stages.items())
    return f"{parts}: {1e3 / total:,.0f} images/s on one core, at most"


def _rate_line(name: str, rate: Rate) -> str:
    return (
        f"{name}: {rate['images_per_s']:,.0f} images/s ({rate['lowest']:,.0f} to "
        f"{rate['highest']:,.0f} in {ROUNDS} rounds), {rate['per_core']:,.0f} per core of {_cores()}"
    )


def _verdict(given: float, needed: float) -> str:
    if given >= needed:
        return (
            f"the loader gives {given / needed:.1f} times what the model needs, when it has the "
            "cores for itself"
        )
    return (
        f"the model waits: the loader gives {given / needed:.0%} of what it needs. More cores and "
        "--workers, or 'python -m train prepare --max-side 512', which says so in the run's log"
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0))
