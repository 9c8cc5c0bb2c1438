"""`python -m train prepare`: class folders -> a few tar files and an index, which is how a cluster's
file system likes a million images. Every image is decoded on the way, so what is there can be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import pyallreduce as par
from train.config import Parser
from train.data.decode import Decoder, Unreadable, decoder
from train.data.sources import (
    COLUMNS,
    FORMAT,
    INDEX,
    SPLITS,
    Folder,
    check_same_classes,
    open_folder,
)

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One image on its way into a shard; `error` says why it is left out."""

    name: str
    label: int
    data: bytes
    error: str = ""


class Preparation:
    """A folder as a torch data set of prepared images."""

    def __init__(self, folder: Folder, split: str, max_side: int | None, quality: int) -> None:
        self._folder, self._split = folder, split
        self._max_side, self._quality = max_side, quality
        self._decode: Decoder = decoder()

    def __getitem__(self, image: int) -> Prepared:
        path, label = self._folder.path(image), int(self._folder.labels[image])
        name = f"{self._split}/{os.path.relpath(path, self._folder.root)}"
        try:
            data = self._folder.read(image)
            rgb = self._decode(data)
        except (Unreadable, OSError) as error:
            return Prepared(name, label, b"", f"{path}: {error}")
        if self._max_side and max(rgb.shape) > self._max_side:
            return Prepared(
                os.path.splitext(name)[0] + ".jpg", label, self._scaled(rgb, self._max_side)
            )
        return Prepared(name, label, data)

    def _scaled(self, rgb: np.ndarray, max_side: int) -> bytes:
        from PIL import Image

        image = Image.fromarray(rgb)
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
        packed = io.BytesIO()
        image.save(packed, "JPEG", quality=self._quality)
        return packed.getvalue()


@dataclasses.dataclass
class Part:
    """What has been written of one part: its files, and a row for each image in them."""

    files: list[Path] = dataclasses.field(default_factory=list)
    rows: list[tuple[int, int, int, int]] = dataclasses.field(default_factory=list)

    def columns(self, split: str) -> dict[str, np.ndarray]:
        columns = np.array(self.rows, dtype=np.int64).reshape(-1, 4).T
        return {f"{split}_{name}": c.copy() for name, c in zip(COLUMNS, columns, strict=True)}


def main(argv: Sequence[str]) -> int:
    """0 done; 1 images that cannot be read, nothing is left behind then; 2 wrong usage."""
    args = _parser().parse_args(argv)
    root, output = Path(args.data_path), Path(args.output_dir)
    folders = {split: open_folder(root / split) for split in SPLITS}
    check_same_classes(folders["train"].classes, folders["val"].classes, root)
    started, images = time.monotonic(), sum(len(folder.labels) for folder in folders.values())
    try:
        output.mkdir(parents=True, exist_ok=True)
        if any(output.iterdir()):
            raise par.UsageError(
                f"--output-dir: {str(output)!r} is not empty, accepted: a new or empty folder; "
                "remove what is there, or give another one"
            )
        unreadable = images - _prepare(folders, output, args)
    except OSError as error:
        raise par.Error(f"cannot write {output}: {error}") from None
    if not (output / INDEX).exists():
        print(
            f"python -m train prepare: {unreadable} images cannot be read, so nothing was written; "
            "replace them, or give --corrupt-images skip to leave them out",
            file=sys.stderr,
        )
        return 1
    print(
        f"prepared {images - unreadable:,} of {images:,} images of "
        f"{len(folders['train'].classes)} classes, "
        f"{images / (time.monotonic() - started):,.0f} images/s; use them with --data-path {output}"
    )
    return 0


def _prepare(folders: dict[str, Folder], output: Path, args: Any) -> int:
    """Returns how many images could be read; leaves shards and index, or nothing."""
    parts = {split: Part() for split in folders}
    try:
        for split, folder in folders.items():
            _write_shards(parts[split], _readable(folder, split, args), output / split, args)
        written = sum(len(part.rows) for part in parts.values())
        everything = written == sum(len(folder.labels) for folder in folders.values())
        if everything or args.corrupt_images == "skip":
            _write_index(output, folders["train"].classes, parts, args)
        return written
    finally:
        if not (output / INDEX).exists():
            for file in (f for part in parts.values() for f in part.files):
                file.unlink()


def _readable(folder: Folder, split: str, args: Any) -> Iterator[Prepared]:
    from train.data.processes import Processes  # torch: --help does without

    preparation = Preparation(folder, split, args.max_side, args.quality)
    processes = Processes(preparation, args.workers, ahead=16)
    for image in processes.answers(range(len(folder.labels))):
        if image.error:
            print(f"cannot read the image {image.error}", file=sys.stderr, flush=True)
        else:
            yield image


def _write_shards(part: Part, images: Iterator[Prepared], stem: Path, args: Any) -> None:
    """STEM-00000.tar, STEM-00001.tar, ...: a new one when the last has its size."""
    image = next(images, None)
    while image:
        path = stem.with_name(f"{stem.name}-{len(part.files):05}.tar")
        part.files.append(path)
        with (
            open(path, "xb") as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            while image and file.tell() < args.shard_mib * MIB:
                info = tarfile.TarInfo(image.name)  # no time, no owner: equal images, equal files
                info.size = len(image.data)
                tar.addfile(info, io.BytesIO(image.data))
                offset = file.tell() - -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                part.rows.append((image.label, len(part.files) - 1, offset, info.size))
                image = next(images, None)
        print(f"{path}  {path.stat().st_size / MIB:,.1f} MiB", flush=True)


def _write_index(output: Path, classes: Sequence[str], parts: dict[str, Part], args: Any) -> None:
    """Last, and whole: a folder with an index is complete."""
    changes = ""
    if args.max_side:
        changes = f", longer side at most {args.max_side}, JPEG quality {args.quality}"
    columns = {
        name: array for split, part in parts.items() for name, array in part.columns(split).items()
    }
    meta = {
        "format": FORMAT,
        "classes": list(classes),
        "files": {split: [f.name for f in part.files] for split, part in parts.items()},
        "bytes": {split: [f.stat().st_size for f in part.files] for split, part in parts.items()},
        "images": {split: len(columns[f"{split}_labels"]) for split in parts},
        "changes": changes,
    }
    temporary = output / f".{INDEX}"
    with open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, meta=np.array(json.dumps(meta)), **columns)
    os.replace(temporary, output / INDEX)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m train prepare",
        allow_abbrev=False,
        description="Make tar shards with an index from train/CLASS/IMAGE and val/CLASS/IMAGE. "
        "Without --max-side the images stay as they are, byte by byte.",
    )
    parser.add_argument("--data-path", required=True, metavar="DIR", help="the class folders")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument(
        "--shard-mib",
        type=_between(1),
        default=256,
        metavar="N",
        help="size of a shard (default: 256)",
    )
    parser.add_argument(
        "--max-side",
        type=_between(1),
        metavar="N",
        help="scale larger images until their longer side has N pixels; faster to decode, and "
        "another recipe: the run's log says so (default: leave them)",
    )
    parser.add_argument(
        "--quality",
        type=_between(1, 95),
        default=90,
        metavar="N",
        help="JPEG quality then (default: 90)",
    )
    parser.add_argument(
        "-j",
        "--workers",
        type=_between(0),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: one per core)",
    )
    parser.add_argument(
        "--corrupt-images",
        choices=("fatal", "skip"),
        default="fatal",
        help="an image that cannot be read: write nothing, or leave it out (default: fatal)",
    )
    return parser


def _between(least: int, most: int = 1 << 20) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdigit() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"given {text!r}, accepted: an integer from {least} to {most}"
            )
        return int(text)

    return read
