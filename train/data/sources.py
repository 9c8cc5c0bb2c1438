"""Where the compressed images of a data set lie: class folders, or tar shards with an index."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pyallreduce import UsageError

SPLITS = ("train", "val")
INDEX = "index.npz"
FORMAT = 1
COLUMNS = ("labels", "shards", "offsets", "lengths")


class Source(Protocol):
    """Compressed images by id; `labels` [N] int64 index into `classes`."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def labels(self) -> np.ndarray: ...

    def read(self, image: int) -> bytes:
        """OSError when the disk refuses."""

    def path(self, image: int) -> str:
        """For messages: what a person looks for."""

    def fingerprint(self) -> str:
        """Equal for equal lists of images; the pixels are not read."""


@dataclasses.dataclass(frozen=True)
class Folder:
    """`root/CLASS/**/IMAGE`; classes and images in the order of their names, as in torchvision."""

    root: Path
    classes: tuple[str, ...]
    labels: np.ndarray
    # Relative to root, as one array: a million Python strings would be copied into every loader
    # worker as their reference counts change.
    names: np.ndarray

    def read(self, image: int) -> bytes:
        return (self.root / os.fsdecode(self.names[image])).read_bytes()

    def path(self, image: int) -> str:
        return str(self.root / os.fsdecode(self.names[image]))

    def fingerprint(self) -> str:
        return digest(self.names, self.labels)


@dataclasses.dataclass(frozen=True)
class Shards:
    """Tar files that any tar program unpacks to class folders; the index says where each image is."""

    files: tuple[Path, ...]
    classes: tuple[str, ...]
    labels: np.ndarray
    shards: np.ndarray
    offsets: np.ndarray  # of the image's bytes, behind the tar header
    lengths: np.ndarray

    def read(self, image: int) -> bytes:
        data = os.pread(
            _descriptor(self.files[self.shards[image]]),
            int(self.lengths[image]),
            int(self.offsets[image]),
        )
        if len(data) != self.lengths[image]:
            raise OSError(f"{len(data)} bytes instead of {self.lengths[image]}: a shorter file")
        return data

    def path(self, image: int) -> str:
        file = self.files[self.shards[image]]
        with tarfile.open(file) as tar:
            names = (m.name for m in tar if m.offset_data == self.offsets[image])
            return f"{file}:{next(names, '?')}"

    def fingerprint(self) -> str:
        return digest(self.labels, self.shards, self.offsets, self.lengths)


@functools.cache
def _descriptor(file: Path) -> int:
    """Opened once; never closed: pread has no position, so forked workers share it."""
    return os.open(file, os.O_RDONLY | os.O_CLOEXEC)


def digest(*arrays: np.ndarray) -> str:
    """SHA-256 over types, shapes and values."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(f"{array.dtype} {array.shape}".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()


@dataclasses.dataclass(frozen=True)
class Opened:
    """Both parts of a data set on disk. `kind` says what they are, for the log."""

    train: Source
    val: Source
    kind: str


def open_both(path: Path) -> Opened:
    """Shards if there is an index, else class folders. UsageError says what is missing."""
    if not path.is_dir():
        raise UsageError(
            f"--data-path: given {str(path)!r}, which is {'a file' if path.exists() else 'not there'}; "
            f"accepted: a folder with train/CLASS/IMAGE and val/CLASS/IMAGE, or with tar shards and "
            f"their {INDEX} (python -m train prepare); check the path on every host"
        )
    if (path / INDEX).exists():
        return _open_shards(path)
    train, val = (open_folder(path / split) for split in SPLITS)
    check_same_classes(train.classes, val.classes, path)
    return Opened(train, val, "class folders")


def open_folder(root: Path) -> Folder:
    """The images below `root`. UsageError when it is missing, empty, or a class has no image."""
    from torchvision.datasets.folder import (
        IMG_EXTENSIONS,
        find_classes,
        has_file_allowed_extension,
        make_dataset,
    )

    def is_image(path: str) -> bool:
        # .DS_Store, ._name.jpg: what desktops leave behind is no image whatever its ending.
        hidden = os.path.basename(path).startswith(".")
        return not hidden and has_file_allowed_extension(path, IMG_EXTENSIONS)

    try:
        classes = [name for name in find_classes(root)[0] if not name.startswith(".")]
        if not classes:
            raise FileNotFoundError("no class folder in it")
        found = make_dataset(
            str(root), {name: i for i, name in enumerate(classes)}, is_valid_file=is_image
        )
    except OSError as error:
        raise UsageError(
            f"--data-path: {str(root)!r} cannot be used ({error}); accepted: a folder with one "
            f"folder of images for each class ({', '.join(IMG_EXTENSIONS)}); "
            "empty class folders have to go"
        ) from None
    names = np.array([os.fsencode(os.path.relpath(path, root)) for path, _ in found])
    return Folder(root, tuple(classes), np.array([label for _, label in found]), names)


# What numpy, zipfile, JSON and our own checks raise for files that are not an index.
_MALFORMED = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)


def _open_shards(path: Path) -> Opened:
    try:
        # A file of our own: numpy leaves its one open when the zip in it is damaged.
        with open(path / INDEX, "rb") as file, np.load(file, allow_pickle=False) as index:
            meta = json.loads(str(index["meta"]))
            arrays = {name: index[name] for name in index.files if name != "meta"}
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
        train, val = (_shards(path, split, meta, arrays) for split in SPLITS)
    except _MALFORMED as error:
        raise UsageError(
            f"--data-path: {str(path / INDEX)!r} is damaged or does not fit its shards "
            f"({type(error).__name__}: {error}); accepted: what 'python -m train prepare' wrote; "
            "copy the folder again, or prepare it again"
        ) from None
    return Opened(train, val, f"{len(train.files) + len(val.files)} tar shards{meta['changes']}")


def _shards(path: Path, split: str, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> Shards:
    files = tuple(path / name for name in meta["files"][split])
    for file, size in zip(files, meta["bytes"][split], strict=True):
        if file.stat().st_size != size:
            raise ValueError(f"{file.name} has {file.stat().st_size} bytes instead of {size}")
    columns = (arrays[f"{split}_{name}"] for name in COLUMNS)
    part = Shards(files, tuple(meta["classes"]), *columns)
    counts = {len(c) for c in (part.labels, part.shards, part.offsets, part.lengths)}
    if counts != {meta["images"][split]} or counts == {0}:
        raise ValueError(f"{counts} entries for {meta['images'][split]} images in {split}")
    _check_rows(part, np.array(meta["bytes"][split], np.int64), split)
    return part


def _check_rows(part: Shards, sizes: np.ndarray, split: str) -> None:
    """ValueError unless every image has a class, and its bytes lie within their shard."""
    for name in COLUMNS:
        column = getattr(part, name)
        if column.dtype != np.int64 or column.ndim != 1:
            raise ValueError(f"{split}_{name} is {column.dtype} {column.shape}, not a row of int64")
    _check_range("label", part.labels, len(part.classes), split)
    _check_range("shard", part.shards, len(part.files), split)
    ends = sizes[part.shards]
    _check_range("offset", part.offsets, ends, split)
    # Not offset + length <= end, which a large length would pass by overflow.
    _check_range("length", part.lengths, ends - part.offsets + 1, split)


def _check_range(what: str, values: np.ndarray, ends: np.ndarray | int, split: str) -> None:
    outside = np.flatnonzero((values < 0) | (values >= ends))
    if len(outside):
        image = outside[0]
        accepted = np.broadcast_to(ends, values.shape)[image] - 1
        raise ValueError(
            f"{what} {values[image]} of image {image} in {split}, accepted: 0 to {accepted}"
        )


def check_same_classes(train: Sequence[str], val: Sequence[str], path: Path) -> None:
    if train == val:
        return
    missing, extra = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    differences = [
        f"{what} {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for what, names in (("only in train:", missing), ("only in val:", extra))
        if names
    ]
    raise UsageError(
        f"--data-path: the class folders of train and val in {str(path)!r} differ: "
        f"{'; '.join(differences)}; accepted: the same names in both, which decide the labels"
    )
