"""The trainer's data: what is read, who gets which image, what happens to damaged files."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyallreduce as par
from ranks import run_ranks

pytest.importorskip("torchvision", reason="torchvision lists, crops and scales the images")
Image = pytest.importorskip("PIL.Image", reason="Pillow writes the images of these tests")

from train import data, data_bench, prepare  # noqa: E402
from train.__main__ import main  # noqa: E402
from train.config import Config, load_preset  # noqa: E402
from train.data import agree, decode, files, images, processes, sources  # noqa: E402
from train.data.transforms import Transform  # noqa: E402

pytestmark = pytest.mark.deadline(120)

CLASSES = ("cat", "dog", "eel")
TRAIN, VAL = 8, 3  # images of each class


class Alone:
    """A communicator of one."""

    rank, size, local_size = 0, 1, 1

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        output.copy_(tensor)


def config(**values: Any) -> Config:
    preset = load_preset("digits")
    small = {"dataset": "imagefolder", "image_size": 24, "eval_resize": 28, "workers": 0}
    return Config(**{**preset, **small, **values})


def jpeg(number: int, size: tuple[int, int] = (40, 32)) -> bytes:
    """A picture whose pixels tell its number, with something for a crop to find."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    packed = io.BytesIO()
    Image.fromarray(coarse).resize(size).save(packed, "JPEG", quality=90)
    return packed.getvalue()


def write_folder(root: Path, size: tuple[int, int] = (40, 32)) -> Path:
    number = 0
    for split, count in (("train", TRAIN), ("val", VAL)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.JPEG").write_bytes(jpeg(number, size))
                number += 1
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "photos")


def load(path: Path, **values: Any) -> data.Dataset:
    return data.load(config(data_path=str(path), **values), Alone())


def epoch(dataset: data.Dataset, **changes: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    settings = {"seed": 3, "epoch": 1, "workers": (0,), "k": 1, "batch_size": 6}
    return list(data.batches(dataset.train, **{**settings, "steps": range(4), **changes}))


def evaluated(dataset: data.Dataset, size: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        batch
        for rank in range(size)
        for batch in data.evaluation_batches(dataset.test, rank=rank, size=size, batch_size=2)
    ]


def same(ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a, b)
        for x, y in zip(ours, theirs, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def images_of(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[bytes]:
    return [pixels.numpy().tobytes() for batch, _ in batches for pixels in batch]


# What decides the pixels, and what does not.


def test_loader_processes_change_no_pixel(folder):
    alone = epoch(load(folder, workers=0))
    for workers, prefetch in ((1, 1), (3, 2)):
        assert same(alone, epoch(load(folder, workers=workers, prefetch=prefetch)))


def test_an_epoch_continues_in_its_middle(folder):
    dataset = load(folder, workers=2)
    whole = epoch(dataset)
    for first in range(4):
        assert same(whole[first:], epoch(dataset, steps=range(first, 4)))


def test_loading_leaves_torchs_generator_alone(folder):
    before = torch.get_rng_state()
    for workers in (0, 2):
        dataset = load(folder, workers=workers)
        epoch(dataset)
        evaluated(dataset)
        assert torch.equal(torch.get_rng_state(), before)


def test_crops_depend_on_seed_and_epoch_and_image(folder):
    dataset = load(folder)
    whole = images_of(epoch(dataset))
    assert len(set(whole)) == TRAIN * len(CLASSES)
    assert not set(whole) & set(images_of(epoch(dataset, epoch=2)))
    assert not set(whole) & set(images_of(epoch(dataset, seed=4)))


@pytest.mark.parametrize("k", [2, 3, 6])
def test_minibatches_have_the_same_pixels_for_every_number_of_workers(folder, k):
    dataset = load(folder)
    expected = [sorted(images_of([batch])) for batch in epoch(dataset)]
    parts = [epoch(dataset, workers=(w,), k=k, batch_size=6 // k) for w in range(k)]
    assert [sorted(images_of(list(step))) for step in zip(*parts, strict=True)] == expected


def test_a_process_may_act_for_several_workers(folder):
    dataset = load(folder)
    together = epoch(dataset, workers=(0, 2), k=3, batch_size=2)
    first, second = (epoch(dataset, workers=(w,), k=3, batch_size=2) for w in (0, 2))
    assert same(together, [batch for pair in zip(first, second, strict=True) for batch in pair])


def test_a_worker_without_images_gets_an_empty_batch(folder):
    dataset = load(folder)  # 24 images: the second minibatch of 16 has 8, for worker 0 alone
    batches = epoch(dataset, workers=(0, 1), k=2, batch_size=8, steps=range(2))
    assert [len(labels) for _, labels in batches] == [8, 8, 8, 0]
    assert batches[3][0].shape == (0, 3, 24, 24)


def test_normalisation_is_the_usual_one(folder):
    from torchvision.transforms import v2

    dataset = load(folder, eval_resize=24)
    data_bytes = (folder / "val" / "cat" / "0.JPEG").read_bytes()
    rgb = torch.from_numpy(np.array(Image.open(io.BytesIO(data_bytes)))).permute(2, 0, 1)
    scaled = v2.functional.resize(
        rgb, [24], interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )
    floats = v2.functional.center_crop(scaled, [24, 24]).float() / 255
    usual = v2.functional.normalize(floats, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (evaluated(dataset)[0][0][0] - usual).abs().max() < 1e-5


def test_augmentation_has_the_papers_extent():
    """Red grows to the right and green downwards, so a crop tells its own extent."""
    transform = Transform(32, 32)
    gradient = np.zeros((300, 400, 3), np.uint8)
    gradient[..., 0] = np.linspace(0, 255, 400)[None, :]
    gradient[..., 1] = np.linspace(0, 255, 300)[:, None]
    areas, flips, ratios = [], [], []
    for image in range(300):
        crop = transform(gradient, images.Draw(0, 0), image).float()
        red, green = crop[0].mean(0), crop[1].mean(1)
        width = (red[-1] - red[0]) / 255 * 400 * 32 / 31
        height = (green[-1] - green[0]) / 255 * 300 * 32 / 31
        flips.append(width < 0)
        areas.append(abs(width * height) / (300 * 400))
        ratios.append(abs(width) / height)
    assert 0.06 < min(areas) < 0.12
    assert 0.85 < max(areas) < 1.03
    assert 0.70 < min(ratios) < 0.80
    assert 1.25 < max(ratios) < 1.40
    assert 110 < sum(flips) < 190


def test_augmentation_can_be_switched_off(folder):
    dataset = load(folder, augment=False)
    first, second = (epoch(dataset, epoch=e) for e in (0, 1))
    assert sorted(images_of(first)) == sorted(images_of(second))
    jittered = load(folder, color_jitter=0.4)
    assert not set(images_of(epoch(jittered))) & set(images_of(epoch(load(folder))))


# Small images in memory.


def small_images(pad: int) -> data.Images:
    pixels = torch.arange(1, 51, dtype=torch.uint8)[:, None, None, None] * torch.ones(
        (1, 3, 9, 9), dtype=torch.uint8
    )
    pixels[:, :, :, 0] = 0  # the left edge, which a flip moves to the right
    return data.Images(pixels, torch.arange(50), pad=pad)


def test_small_images_are_shifted_and_flipped_by_image_not_by_batch():
    settings = {"seed": 0, "epoch": 0, "workers": (0,), "k": 1}
    whole = {}
    for pixels, labels in data.batches(small_images(4), **settings, batch_size=50, steps=range(1)):
        whole = dict(zip(labels.tolist(), pixels, strict=True))
    for pixels, labels in data.batches(small_images(4), **settings, batch_size=7, steps=range(7)):
        for label, image in zip(labels.tolist(), pixels, strict=True):
            assert torch.equal(image, whole[label])
    assert len({tuple((v[0] > 0).any(1).tolist()) for v in whole.values()}) > 3  # rows: shifts


def test_shifts_reach_four_pixels_each_way_and_every_other_image_is_flipped():
    marked = torch.zeros(1000, 1, 9, 9)
    marked[:, 0, 4, 4] = 1
    part = data.Images(marked, torch.arange(1000), pad=4)
    (loaded,) = part.load([images.Request(np.arange(1000), images.Draw(0, 0))])
    where = loaded.pixels[:, 0].nonzero()[:, 1:]
    assert len(where) == 1000
    assert {tuple(p) for p in where.tolist()} == {(y, x) for y in range(9) for x in range(9)}
    edge = data.Images(torch.eye(9)[None, None].repeat(1000, 1, 1, 1), torch.arange(1000), pad=1)
    (loaded,) = edge.load([images.Request(np.arange(1000), images.Draw(0, 0))])
    falling = loaded.pixels[:, 0, 3:6, :].argmax(2)
    flipped = (falling[:, 0] > falling[:, 2]).sum()
    assert 400 < flipped < 600


# Evaluation.


@pytest.mark.parametrize("size", [1, 2, 4, 10])
def test_evaluation_gives_every_image_once_whatever_the_number_of_ranks(folder, size):
    one, several = evaluated(load(folder)), evaluated(load(folder, workers=1), size)
    assert sorted(images_of(several)) == sorted(images_of(one))
    assert len(set(images_of(one))) == VAL * len(CLASSES)


def test_evaluation_does_not_depend_on_the_epoch_of_training(folder):
    dataset = load(folder)
    first = evaluated(dataset)
    epoch(dataset)
    assert same(first, evaluated(dataset))


# Damaged images.


def damage(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:200])
    return file


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_ends_the_run_with_its_path(folder, workers):
    bad = damage(folder / "train" / "dog" / "4.JPEG")
    with pytest.raises(files.UnreadableImageError, match=f"{bad}.*--corrupt-images skip"):
        epoch(load(folder, workers=workers))


def test_a_damaged_image_is_skipped_and_reported_once(folder, caplog):
    whole = epoch(load(folder))
    bad = damage(folder / "train" / "dog" / "4.JPEG")
    dataset = load(folder, corrupt_images="skip", workers=2)
    skipped = epoch(dataset)
    assert [len(labels) for _, labels in skipped] == [6, 6, 6, 6]
    # Its place has the next image, number 13; all else is as it was.
    gone = set(images_of(whole)) - set(images_of(skipped))
    assert len(gone) == 1
    assert set(images_of(skipped)) <= set(images_of(whole))
    epoch(dataset)
    assert [str(bad) in record.getMessage() for record in caplog.records] == [True]


def test_a_damaged_held_out_image_counts_as_an_error(folder):
    damage(folder / "val" / "eel" / "0.JPEG")
    labels = torch.cat([y for _, y in evaluated(load(folder, corrupt_images="skip"))])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, data.UNREADABLE, 2, 2]
    with pytest.raises(files.UnreadableImageError, match=r"eel/0\.JPEG"):
        evaluated(load(folder))


def test_a_data_set_of_damaged_images_is_given_up(folder, monkeypatch):
    monkeypatch.setattr(files, "GIVE_UP_AFTER", 5)
    for i in range(TRAIN):
        damage(folder / "train" / "dog" / f"{i}.JPEG")
    with pytest.raises(files.UnreadableImageError, match="5 images in a row"):
        epoch(load(folder, corrupt_images="skip"))


# Decoders.


def odd_images() -> dict[str, bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    smooth = Image.fromarray(pixels[:6, :8]).resize((80, 60))
    rgb = smooth.convert("RGB")

    def packed(image: Any, kind: str = "JPEG", **options: Any) -> bytes:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        return stream.getvalue()

    return {
        "4:4:4": packed(rgb, subsampling=0),
        "4:2:2": packed(rgb, subsampling=1),
        "4:2:0": packed(rgb, subsampling=2, quality=30),
        "progressive": packed(rgb, progressive=True),
        "grey": packed(rgb.convert("L")),
        "CMYK": packed(rgb.convert("CMYK")),
        "PNG": packed(rgb, "PNG"),
        "transparent PNG": packed(smooth.convert("RGBA"), "PNG"),
    }


@pytest.mark.parametrize("name", decode.FAST)
def test_fast_decoders_give_pillows_pixels(name):
    pytest.importorskip(name, reason=f"{name} is not installed")
    fast, pillow = decode.decoder(name), decode.decoder("pillow")
    assert fast.name.startswith(name)
    for kind, packed in odd_images().items():
        assert np.array_equal(fast(packed), pillow(packed)), kind


@pytest.mark.parametrize("name", ["auto", "pillow"])
def test_what_is_no_image_is_unreadable(name):
    whole = jpeg(0)
    for broken in (b"", b"text", whole[:300], whole[:-20]):
        with pytest.raises(decode.Unreadable):
            decode.decoder(name)(broken)


def test_a_missing_decoder_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(par.UsageError, match="pip install simplejpeg"):
        decode.decoder("simplejpeg")
    assert not decode.decoder("auto").name.startswith("simplejpeg")


# Folders, and what is wrong with them.


def test_hidden_files_are_no_images_and_hidden_folders_no_classes(folder):
    before = load(folder)
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "dog" / "._4.JPEG").write_bytes(b"from a desktop")
    after = load(folder)
    assert (len(after.train), after.num_classes) == (len(before.train), 3)
    assert after.fingerprint == before.fingerprint


def rename_train(root: Path) -> None:
    (root / "train").rename(root / "training")


def rename_class(root: Path) -> None:
    (root / "val" / "eel").rename(root / "val" / "elk")


def empty_class(root: Path) -> None:
    (root / "train" / "fox").mkdir()
    (root / "val" / "fox").mkdir()


def no_class(root: Path) -> None:
    for folder in (root / "val").iterdir():
        folder.rename(root / folder.name)


def file_for_folder(root: Path) -> None:
    root.rename(root.with_name("moved"))
    root.write_bytes(b"")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (rename_train, r"photos/train' cannot be used.*one folder of images for each class"),
        (rename_class, "only in train: eel; only in val: elk"),
        (empty_class, "fox.*empty class folders have to go"),
        (no_class, r"photos/val' cannot be used"),
        (file_for_folder, "which is a file; accepted: a folder with train/CLASS/IMAGE"),
        (lambda root: root.rename(root.with_name("gone")), "which is not there"),
    ],
)
def test_a_wrong_folder_says_what_is_wrong(folder, wrong, message):
    wrong(folder)
    with pytest.raises(par.UsageError, match=message) as refusal:
        load(folder)
    assert str(refusal.value).startswith("--data-path: ")


def test_wrong_input_is_exit_code_2_and_one_line(folder):
    empty_class(folder)
    command = [sys.executable, "-m", "train", "classify", "--dataset", "imagefolder"]
    where = ["--data-path", str(folder), "--output-dir", str(folder / "runs")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [*command, *where], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "empty class folders have to go" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (folder / "runs").exists()


def test_a_missing_data_path_is_asked_for():
    with pytest.raises(par.UsageError, match=r"--data-path: missing.*or --synthetic"):
        data.load(config(), Alone())


def test_a_minibatch_above_the_data_set_is_refused(folder):
    with pytest.raises(par.UsageError, match="25 images, accepted: at most the 24"):
        data.steps_per_epoch(len(load(folder).train), 25)


def test_an_unknown_data_set_names_the_known_ones():
    with pytest.raises(par.UsageError, match="'mnist', accepted: cifar10, digits, fashion-mnist"):
        data.load(config(dataset="mnist"), Alone())


def rank_with_its_own_folder(rank: int, size: int, *roots: str) -> list[str]:
    verdicts = []
    with closing(par.init(timeout_s=20)) as comm:
        for root in roots:
            try:
                data.load(config(data_path=f"{root}/{rank}"), comm)
                verdicts.append("loaded")
            except par.UsageError as error:
                verdicts.append(str(error))
    return verdicts


def test_ranks_with_other_files_stop_together(tmp_path):
    roots = [tmp_path / name for name in ("equal", "less", "wrong")]
    for root in roots:
        for rank in range(2):
            write_folder(root / str(rank))
    (tmp_path / "less" / "1" / "train" / "cat" / "0.JPEG").unlink()
    rename_class(tmp_path / "wrong" / "1")
    for equal, less, wrong in run_ranks(2, rank_with_its_own_folder, *map(str, roots)):
        assert equal == "loaded"
        assert "rank 1 has another list of images than rank 0" in less
        assert wrong.startswith("rank 1: --data-path")
        assert "only in val: elk" in wrong


# Shards.


@pytest.fixture
def shards(folder, tmp_path) -> Path:
    output = tmp_path / "shards"
    code = prepare.main(["--data-path", str(folder), "--output-dir", str(output), "--workers", "0"])
    assert code == 0
    return output


def test_shards_hold_the_same_images_as_the_folder(folder, shards):
    ours, theirs = load(shards, workers=2), load(folder)
    assert same(epoch(ours), epoch(theirs))
    assert same(evaluated(ours), evaluated(theirs))
    assert "2 tar shards" in ours.description


def test_any_tar_program_reads_the_folder_in_shards(folder, shards):
    packed = {}
    for file in shards.glob("*.tar"):
        with tarfile.open(file) as tar:
            packed |= {member.name: tar.extractfile(member).read() for member in tar}
    files = [file for file in folder.rglob("*.JPEG") if file.is_file()]
    assert files
    for file in files:
        assert packed[str(file.relative_to(folder))] == file.read_bytes()


def test_shards_are_cut_by_size_and_the_same_every_time(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MIB", 4096)
    contents = []
    for name in ("first", "second"):
        flags = ["--data-path", str(folder), "--output-dir", str(tmp_path / name)]
        assert prepare.main([*flags, "--shard-mib", "2", "--workers", "2"]) == 0
        contents.append({f.name: f.read_bytes() for f in (tmp_path / name).glob("*.tar")})
    assert len(contents[0]) > 3
    assert contents[0] == contents[1]
    assert same(epoch(load(tmp_path / "first")), epoch(load(folder)))


def test_prepare_scales_and_says_so(tmp_path):
    folder = write_folder(tmp_path / "large", size=(200, 100))
    flags = ["--data-path", str(folder), "--output-dir", str(tmp_path / "out"), "--workers", "1"]
    assert prepare.main([*flags, "--max-side", "50", "--quality", "80"]) == 0
    dataset = load(tmp_path / "out")
    assert "longer side at most 50, JPEG quality 80" in dataset.description
    source = dataset.train.reader.source
    assert {Image.open(io.BytesIO(source.read(i))).size for i in range(len(source.labels))} == {
        (50, 25)
    }


def test_prepare_reports_damaged_images(folder, tmp_path, capsys):
    bad = damage(folder / "train" / "dog" / "4.JPEG")
    flags = ["prepare", "--data-path", str(folder), "--output-dir", str(tmp_path / "out")]
    assert main(flags) == 1
    assert f"cannot read the image {bad}" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert main([*flags, "--corrupt-images", "skip"]) == 0
    assert len(load(tmp_path / "out").train) == TRAIN * len(CLASSES) - 1
    assert main(flags) == 2
    assert "is not empty" in capsys.readouterr().err


def shorten(shards: Path) -> None:
    file = shards / "train-00000.tar"
    file.write_bytes(file.read_bytes()[:-512])


def garble(shards: Path) -> None:
    file = shards / sources.INDEX
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def from_the_future(shards: Path) -> None:
    with np.load(shards / sources.INDEX) as index:
        arrays = dict(index)
    meta = json.loads(str(arrays["meta"]))
    arrays["meta"] = np.array(json.dumps({**meta, "format": 99}))
    np.savez(shards / sources.INDEX, **arrays)


def rewrite(shards: Path, column: str, change: Any) -> None:
    with np.load(shards / sources.INDEX) as index:
        arrays = dict(index)
    arrays[column] = change(arrays[column])
    np.savez(shards / sources.INDEX, **arrays)


def with_first(value: int) -> Any:
    """The column with another number for its first image."""
    return lambda column: np.concatenate([[value], column[1:]])


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("train_labels", with_first(len(CLASSES)), "label .* of image 0 in train, accepted: 0 to"),
        ("train_labels", with_first(-1), "label -1 of image 0"),
        ("val_shards", with_first(1), "shard 1 of image 0 in val, accepted: 0 to 0"),
        ("val_shards", with_first(-1), "shard -1"),
        ("train_offsets", with_first(-512), "offset -512"),
        ("train_offsets", with_first(1 << 40), "offset 1099511627776"),
        ("train_lengths", with_first(-1), "length -1"),
        ("train_lengths", with_first(1 << 40), "length 1099511627776"),
        ("train_lengths", with_first(2**63 - 1), "length 9223372036854775807"),
        ("train_lengths", lambda column: column.astype(float), "train_lengths is float64"),
        ("train_lengths", lambda column: column[:, None], "not a row of int64"),
        ("train_lengths", lambda column: column[1:], r"entries for \d+ images in train"),
    ],
)
def test_an_index_that_points_outside_its_shards_is_refused(shards, column, change, message):
    rewrite(shards, column, change)
    with pytest.raises(par.UsageError, match=f"index.npz' is damaged .*{message}"):
        load(shards)


def test_an_image_may_end_with_its_shard(shards):
    """The last byte is inside: a bound that is one too low would refuse it."""
    size = (shards / "train-00000.tar").stat().st_size
    with np.load(shards / sources.INDEX) as index:
        rest = size - int(index["train_offsets"][0])
    rewrite(shards, "train_lengths", with_first(rest))
    assert len(load(shards).train.reader.source.read(0)) == rest
    rewrite(shards, "train_lengths", with_first(rest + 1))
    with pytest.raises(par.UsageError, match="length"):
        load(shards)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda shards: (shards / sources.INDEX).write_bytes(b""), "index.npz' is damaged"),
        (shorten, r"train-00000\.tar has \d+ bytes instead of"),
        (garble, "index.npz' is damaged"),
        (from_the_future, "format 99, this version reads 1"),
        (lambda shards: (shards / "val-00000.tar").unlink(), r"val-00000\.tar"),
    ],
)
def test_damaged_shards_are_refused(shards, wrong, message):
    wrong(shards)
    with pytest.raises(par.UsageError, match=message):
        load(shards)


def test_a_damaged_image_in_a_shard_is_found_by_its_name(shards):
    file = shards / "train-00000.tar"
    content = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        offset = tar.getmember("train/dog/4.JPEG").offset_data
    content[offset : offset + 100] = bytes(100)
    file.write_bytes(content)
    with pytest.raises(files.UnreadableImageError, match=r"train-00000\.tar:train/dog/4\.JPEG"):
        epoch(load(shards))


# Data sets of their own layout.


def write_idx(file: Path, values: np.ndarray) -> None:
    sizes = struct.pack(f">{values.ndim}I", *values.shape)
    file.write_bytes(gzip.compress(bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()))


def test_fashion_mnist_is_read_from_its_files(tmp_path):
    rng = np.random.default_rng(0)
    for name, n in (("train", 20), ("t10k", 5)):
        write_idx(
            tmp_path / f"{name}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28), np.uint8)
        )
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8) % 10)
    dataset = load(tmp_path, dataset="fashion-mnist")
    assert (len(dataset.train), len(dataset.test), dataset.shape) == (20, 5, (1, 28, 28))
    pixels, labels = evaluated(dataset)[0]
    assert labels.tolist() == [0, 1]
    ((normal, _),) = epoch(
        load(tmp_path, dataset="fashion-mnist", augment=False), batch_size=20, steps=range(1)
    )
    assert normal.mean().abs() < 1e-5
    assert abs(normal.std() - 1) < 1e-5
    assert pixels.shape == (2, 1, 28, 28)

    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1]))
    with pytest.raises(par.UsageError, match="not those of an idx file"):
        load(tmp_path, dataset="fashion-mnist")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(par.UsageError, match="train-images-idx3-ubyte"):
        load(tmp_path, dataset="fashion-mnist")


def test_cifar10_is_read_from_class_folders_of_its_size(tmp_path):
    dataset = load(write_folder(tmp_path / "c", size=(32, 32)), dataset="cifar10")
    assert dataset.shape == (3, 32, 32)
    assert (len(dataset.train), len(dataset.test)) == (24, 9)
    assert len(set(images_of(epoch(dataset)))) == 24
    with pytest.raises(par.UsageError, match="has 40x32 pixels, accepted for this data set: 32x32"):
        load(write_folder(tmp_path / "d"), dataset="cifar10")


def test_synthetic_images_need_no_files():
    dataset = data.load(config(synthetic=True, synthetic_images=100), Alone())
    assert (len(dataset.train), dataset.num_classes, dataset.shape) == (100, 1000, (3, 24, 24))
    assert [pixels.shape for pixels, _ in epoch(dataset)] == [(6, 3, 24, 24)] * 4
    digits = data.load(config(synthetic=True, dataset="digits"), Alone())
    assert (digits.num_classes, digits.shape) == (10, (1, 8, 8))


# Processes.

LOADING = """
import sys, time
from train import data
sys.path.insert(0, {tests!r})
from test_data import load
from pathlib import Path
batches = data.batches(load(Path({folder!r}), workers=2).train, seed=0, epoch=0, workers=(0,), k=1,
                       batch_size=2, steps=range(12))
next(batches)
print("loading", flush=True)
time.sleep(60)
"""


def workers_of(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ignores(pid: int, number: signal.Signals) -> bool:
    mask = re.search(r"^SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert mask is not None
    return bool(int(mask[1], 16) >> (number - 1) & 1)


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_loader_processes_outlive_signals_and_end_with_their_rank(folder):
    root = Path(__file__).parent
    script = LOADING.format(tests=str(root), folder=str(folder))
    environment = {**os.environ, "PYTHONPATH": str(root.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
    ) as rank:
        assert rank.stdout
        assert rank.stdout.readline() == "loading\n"
        workers = workers_of(rank.pid)
        assert len(workers) == 2
        # The last thing that a worker prepares.
        assert within(10, lambda: all(ignores(worker, signal.SIGUSR1) for worker in workers))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            for worker in workers:
                os.kill(worker, number)
        assert not within(0.5, lambda: not all(map(running, workers)))
        rank.kill()
        assert within(5, lambda: not any(map(running, workers)))


def test_loader_processes_serve_one_epoch_after_the_other(folder):
    others = set(multiprocessing.active_children())

    def serving() -> set[int | None]:
        return {child.pid for child in multiprocessing.active_children() if child not in others}

    def batches(of: data.Dataset, epoch: int) -> data.Batches:
        settings = {"seed": 3, "workers": (0,), "k": 1, "batch_size": 6, "steps": range(4)}
        return data.batches(of.train, epoch=epoch, **settings)

    dataset, expected = load(folder, workers=2), load(folder, workers=0)
    # As the trainer does: it knows how many there are, and asks for no more.
    found = list(itertools.islice(batches(dataset, 0), 4))
    first = serving()
    assert same(found, list(batches(expected, 0)))
    assert len(first) == 2

    assert same(list(batches(dataset, 1)), list(batches(expected, 1)))
    assert serving() == first

    abandoned = batches(dataset, 2)
    next(abandoned)
    assert same(list(batches(dataset, 3)), list(batches(expected, 3)))
    second = serving() - first
    assert len(second) == 2  # the first are busy with what is still asked of them
    del abandoned
    assert within(5, lambda: serving() == second)

    assert same(list(batches(dataset, 4)), list(batches(expected, 4)))
    assert serving() == second
    del dataset
    assert within(5, lambda: not serving())


ENDING = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_data import data, load
batches = data.batches(load(Path({folder!r}), workers=2).train, seed=0, epoch=0, workers=(0,), k=1,
                       batch_size=2, steps=range(12))
next(batches)
cycle = [batches]
cycle.append(cycle)
"""


def test_a_loader_that_nobody_finished_does_not_hold_up_the_end(folder):
    root = Path(__file__).parent
    script = ENDING.format(tests=str(root), folder=str(folder))
    environment = {**os.environ, "PYTHONPATH": str(root.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=processes.OUTLIVE_SIGTERM_S / 2,  # as long as the workers would have lived
    )
    assert (done.returncode, done.stderr) == (0, "")


# The bench.


def test_data_bench_compares_loaders_and_model(folder, monkeypatch, capsys):
    monkeypatch.setattr(data_bench, "ROUND_S", 0.1)
    flags = ["--dataset", "imagefolder", "--data-path", str(folder), "--model", "resnet18"]
    size = ["--image-size", "32", "--eval-resize", "32", "-b", "4", "-j", "1"]
    assert main(["data-bench", *flags, *size, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["loaders"]) == {"this trainer", "Pillow", "torchvision"}
    for rate in found["loaders"].values():
        assert 0 < rate["lowest"] <= rate["images_per_s"] <= rate["highest"]
    assert found["model_images_per_s"] > 0
    assert set(found["image_ms"]) == {"read", "decode", "augment"}


def test_data_bench_takes_grey_images_and_the_network_must_too(monkeypatch, capsys):
    monkeypatch.setattr(data_bench, "ROUND_S", 0.05)
    assert main(["data-bench", "--preset", "digits", "-b", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model_images_per_s"] > 0
    assert main(["data-bench", "--preset", "digits", "--model", "cifar-resnet20"]) == 2
    said = capsys.readouterr()
    assert "takes images of 3 channels, but those of the data set have 1" in said.err
    assert said.out == ""  # nothing was measured for it


def test_data_bench_says_who_waits():
    assert "gives 2.0 times what the model needs" in data_bench._verdict(200.0, 100.0)
    assert "the model waits: the loader gives 50% of what it needs" in data_bench._verdict(
        50.0, 100.0
    )


def test_answers_of_ranks_are_cut_to_their_buffer():
    def fail() -> Any:
        raise par.UsageError("x" * 5000)

    with pytest.raises(par.UsageError, match=r"^x{1000}"):
        agree.on_every_rank(Alone(), fail)
