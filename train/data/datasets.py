"""Data sets by name: where they come from, how they are split, how they are augmented."""

from __future__ import annotations

import dataclasses
import fcntl
import gzip
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyallreduce import Communicator, UsageError
from train.config import Config
from train.data.agree import on_every_rank
from train.data.decode import Unreadable, decoder
from train.data.images import Images, Loaded, Normalisation, Part, Request
from train.data.sources import Folder, Opened, Source, digest, open_both

TEST_EVERY = 5
# More worker processes per rank than this wait for each other's memory, not for the processor.
MOST_WORKERS = 16
SYNTHETIC_POOL = 64


@dataclasses.dataclass(frozen=True)
class Dataset:
    """`shape` is [C, H, W] of a batch's images; `description` is for the log."""

    train: Part
    test: Part
    num_classes: int
    shape: tuple[int, int, int]
    description: str
    fingerprint: str


def held_out(labels: np.ndarray) -> np.ndarray:
    """Ids of the test images, sorted: of every class its 1st, 6th, 11th, ... image in file order.

    Stratified, and fixed without a generator: the split is the same under every version of every
    library.
    """
    return np.sort(
        np.concatenate([np.flatnonzero(labels == c)[::TEST_EVERY] for c in np.unique(labels)])
    )


def digits() -> Dataset:
    """scikit-learn's handwritten digits: 1433 training and 364 test images [1, 8, 8]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError(
            f"the data set 'digits' is part of scikit-learn, which cannot be imported "
            f"({error}); run: pip install 'pyallreduce[train]'"
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    test = np.zeros(len(labels), dtype=bool)
    test[held_out(labels)] = True
    # Statistics of the training part only: the test images must not leak into them.
    scaled = (pixels - pixels[~test].mean()) / pixels[~test].std()
    images = torch.from_numpy(scaled.astype(np.float32)).view(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    mask = torch.from_numpy(test)
    train, held = (Images(images[chosen], targets[chosen]) for chosen in (~mask, mask))
    description = f"{_sizes(train, held, 10)}, in memory"
    return Dataset(train, held, 10, (1, 8, 8), description, digest(pixels, labels))


def cifar10(cfg: Config, processes: int) -> Dataset:
    """50,000 + 10,000 photographs of 32x32: torchvision's layout, class folders, or shards."""
    path = _path(cfg)
    if not cfg.download and not (path / "cifar-10-batches-py").is_dir():
        opened = open_both(path)
        train, test = (_decoded(part, 32, cfg.decoder) for part in (opened.train, opened.val))
        return _small(cfg, train, test, len(opened.train.classes), opened.kind)
    from torchvision.datasets import CIFAR10

    def part(train: bool) -> tuple[Tensor, Tensor]:
        made = _torchvision(
            lambda: CIFAR10(path, train=train, download=cfg.download), path, cfg.download
        )
        return torch.from_numpy(made.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(
            made.targets
        )

    return _small(cfg, part(train=True), part(train=False), 10, "torchvision's files")


def fashion_mnist(cfg: Config, processes: int) -> Dataset:
    """60,000 + 10,000 articles of 28x28, grey: the four idx files, gzipped or not."""
    path = _path(cfg)
    if cfg.download:
        from torchvision.datasets import FashionMNIST

        _torchvision(lambda: FashionMNIST(path, download=True), path, True)
    raw = path / "FashionMNIST" / "raw"
    folder = raw if raw.is_dir() else path

    def part(name: str) -> tuple[Tensor, Tensor]:
        pixels = _idx(folder, f"{name}-images-idx3-ubyte")
        return pixels[:, None], _idx(folder, f"{name}-labels-idx1-ubyte").long()

    return _small(cfg, part("train"), part("t10k"), 10, "idx files")


def flowers(cfg: Config, processes: int) -> Dataset:
    """Oxford's 102 flowers in torchvision's layout, or any flowers in class folders or shards.

    Of Oxford's parts, train and val (2,040 photographs) are for training, test (6,149) is held out.
    """
    path = _path(cfg)
    if cfg.download or (path / "flowers-102").is_dir():
        from scipy.io import loadmat
        from torchvision.datasets import Flowers102

        _torchvision(lambda: Flowers102(path, download=cfg.download), path, cfg.download)
        root = path / "flowers-102"
        labels = loadmat(root / "imagelabels.mat")["labels"].ravel().astype(np.int64) - 1
        split = loadmat(root / "setid.mat")
        classes = tuple(str(label + 1) for label in range(102))

        def part(*names: str) -> Folder:
            ids = np.sort(np.concatenate([split[name].ravel() for name in names]))
            files = np.array([os.fsencode(f"image_{i:05}.jpg") for i in ids])
            return Folder(root / "jpg", classes, labels[ids - 1], files)

        return _from_disk(
            cfg, Opened(part("trnid", "valid"), part("tstid"), "torchvision's files"), processes
        )
    return _from_disk(cfg, open_both(path), processes)


def imagefolder(cfg: Config, processes: int) -> Dataset:
    """train/CLASS/IMAGE and val/CLASS/IMAGE, or the tar shards made from them."""
    return _from_disk(cfg, open_both(_path(cfg)), processes)


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """Noise that costs nothing to load: `count` images that repeat a few, labels in turn."""

    pool: Tensor
    count: int
    num_classes: int
    normalisation: Normalisation | None = None

    def __len__(self) -> int:
        return self.count

    def load(self, requests: Iterable[Request], pin_memory: bool = False) -> Iterator[Loaded]:
        for request in requests:
            ids = torch.from_numpy(request.ids)
            yield Loaded(self.pool[ids % len(self.pool)], ids % self.num_classes)


def synthetic(cfg: Config, processes: int) -> Dataset:
    """Random images of the data set's shape, without its files: the speed of everything but them."""
    channels, size, num_classes = SHAPES.get(cfg.dataset, (3, None, 1000))
    shape = (channels, size or cfg.image_size, size or cfg.image_size)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(SYNTHETIC_POOL, *shape, generator=generator)
    train, test = (
        Synthetic(pool, count, num_classes) for count in (cfg.synthetic_images, num_classes)
    )
    description = f"{_sizes(train, test, num_classes)}, synthetic noise"
    return Dataset(train, test, num_classes, shape, description, digest(pool.numpy()))


DATASETS: dict[str, Callable[[Config, int], Dataset]] = {
    "digits": lambda cfg, processes: digits(),
    "cifar10": cifar10,
    "fashion-mnist": fashion_mnist,
    "flowers": flowers,
    "imagefolder": imagefolder,
    "synthetic": synthetic,
}
# Channels, side (None: --image-size), classes: what synthetic images stand in for.
SHAPES = {"digits": (1, 8, 10), "cifar10": (3, 32, 10), "fashion-mnist": (1, 28, 10)}


def load(cfg: Config, comm: Communicator) -> Dataset:
    """Collective: the data set of the configuration, the same on every rank.

    UsageError on every rank, with the reason on rank 0, when one cannot load it or has another.
    """
    if cfg.dataset not in DATASETS:
        raise UsageError(
            f"--dataset: given {cfg.dataset!r}, accepted: {', '.join(sorted(DATASETS))}; "
            "choose one of these"
        )
    name = "synthetic" if cfg.synthetic else cfg.dataset
    return on_every_rank(comm, lambda: DATASETS[name](cfg, comm.local_size))


def _path(cfg: Config) -> Path:
    if cfg.data_path is None:
        raise UsageError(
            f"--data-path: missing, the data set {cfg.dataset!r} is read from a folder; give "
            "--data-path DIR, or --synthetic to do without images"
        )
    return Path(cfg.data_path).expanduser()


def _torchvision(make: Callable[[], Any], path: Path, download: bool) -> Any:
    """A data set of torchvision's, downloaded by the first rank of a host; the others wait for it."""
    try:
        if not download:
            return make()
        path.mkdir(parents=True, exist_ok=True)
        with open(path / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return make()
    except (RuntimeError, OSError) as error:
        raise UsageError(
            f"--data-path: torchvision cannot use {str(path)!r} ({error}); accepted: its own "
            "layout of this data set; check the files, or let --download fetch them"
        ) from None


def _idx(folder: Path, name: str) -> Tensor:
    """A file of the MNIST family: two zero bytes, type 8, dimensions, big-endian sizes, bytes."""
    try:
        plain = folder / name
        packed = folder / f"{name}.gz"
        data = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
        sizes = np.frombuffer(data, ">u4", count=data[3], offset=4)
        if data[:3] != b"\0\0\x08" or len(data) != 4 + sizes.nbytes + np.prod(sizes, dtype=int):
            raise ValueError("its length or its first bytes are not those of an idx file of bytes")
        values = np.frombuffer(data, np.uint8, offset=4 + sizes.nbytes).reshape(sizes)
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise UsageError(
            f"--data-path: {str(folder / name)!r}(.gz) cannot be read ({error}); accepted: the four "
            "files of Fashion-MNIST, here or in FashionMNIST/raw; or let --download fetch them"
        ) from None
    return torch.from_numpy(values.copy())


def _small(
    cfg: Config,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_classes: int,
    kind: str,
) -> Dataset:
    """In memory, by the training part's mean and deviation, with shifts and flips."""
    pixels = train[0].double()
    normalisation = Normalisation(
        tuple(pixels.mean(dim=(0, 2, 3)).tolist()), tuple(pixels.std(dim=(0, 2, 3)).tolist())
    )
    pad = 4 if cfg.augment else 0
    first, second = (Images(*part, normalisation, pad) for part in (train, test))
    channels, height, width = pixels.shape[1:]
    return Dataset(
        first,
        second,
        num_classes,
        (channels, height, width),
        f"{_sizes(first, second, num_classes)}, {kind}, in memory",
        digest(*(tensor.numpy() for tensor in (*train, *test))),
    )


def _decoded(source: Source, size: int, choice: str) -> tuple[Tensor, Tensor]:
    decode = decoder(choice)
    pixels = np.empty((len(source.labels), size, size, 3), np.uint8)
    for image in range(len(pixels)):
        try:
            rgb = decode(source.read(image))
        except (Unreadable, OSError) as error:
            raise UsageError(
                f"--data-path: cannot read the image {source.path(image)} ({error}); replace it"
            ) from None
        if rgb.shape != pixels.shape[1:]:
            raise UsageError(
                f"--data-path: {source.path(image)} has {rgb.shape[1]}x{rgb.shape[0]} pixels, "
                f"accepted for this data set: {size}x{size}; for photographs use --dataset imagefolder"
            )
        pixels[image] = rgb
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(
        source.labels
    )


def _from_disk(cfg: Config, opened: Opened, processes: int) -> Dataset:
    """Photographs: the paper's augmentation and evaluation, by worker processes."""
    try:
        from train.data.files import Files, Loading, Reader
        from train.data.transforms import IMAGENET, Transform
    except ImportError as error:
        raise UsageError(
            f"--dataset: photographs need torchvision, which cannot be imported ({error}); "
            "run: pip install 'pyallreduce[train]'"
        ) from None
    decode = decoder(cfg.decoder)
    loading = Loading(
        workers=_workers(cfg, processes),
        ahead=cfg.prefetch,
        skip_unreadable=cfg.corrupt_images == "skip",
    )
    transform = Transform(cfg.image_size, cfg.eval_resize, cfg.color_jitter, cfg.augment)
    train, test = (
        Files(Reader(source, decode, transform), IMAGENET, loading)
        for source in (opened.train, opened.val)
    )
    num_classes = len(opened.train.classes)
    return Dataset(
        train,
        test,
        num_classes,
        (3, cfg.image_size, cfg.image_size),
        f"{_sizes(train, test, num_classes)}, {opened.kind}; decoded by {decode.name}, "
        f"{loading.workers} loader processes per rank",
        digest(np.array([opened.train.fingerprint(), opened.val.fingerprint()])),
    )


def _workers(cfg: Config, processes: int) -> int:
    if cfg.workers is not None:
        return cfg.workers
    return min(MOST_WORKERS, max(1, len(os.sched_getaffinity(0)) // processes))


def _sizes(train: Part, test: Part, num_classes: int) -> str:
    return f"{len(train):,} + {len(test):,} images of {num_classes} classes"
