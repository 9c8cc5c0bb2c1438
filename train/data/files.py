"""Images on disk: read, decoded and augmented by worker processes, batch by batch."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset

import pyallreduce as par
from train.data.decode import Decoder, Unreadable
from train.data.images import UNREADABLE, Draw, Loaded, Normalisation, Request, one_thread
from train.data.processes import Processes
from train.data.sources import Source
from train.data.transforms import Transform

# So many unreadable images after one another are no accident of single files.
GIVE_UP_AFTER = 100

log = logging.getLogger(__name__)


class UnreadableImageError(par.Error):
    """An image cannot be decoded, and --corrupt-images is not skip."""


@dataclasses.dataclass(frozen=True)
class Loading:
    """How images are loaded; changes the speed and no pixel. `ahead`: batches per worker."""

    workers: int
    ahead: int = 2
    skip_unreadable: bool = False


@dataclasses.dataclass(frozen=True)
class Reader(Dataset[Loaded]):
    """What a worker process does: whole batches from a source, by a decoder and a transform."""

    source: Source
    decode: Decoder
    transform: Transform

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, request: Request) -> Loaded:
        pixels = torch.empty((len(request.ids), *self.transform.shape), dtype=torch.uint8)
        labels = torch.empty(len(request.ids), dtype=torch.int64)
        unreadable: list[str] = []
        with one_thread():
            for slot, image in enumerate(request.ids.tolist()):
                labels[slot] = self._fill(pixels[slot], image, request.draw, unreadable)
        return Loaded(pixels, labels, tuple(unreadable))

    def _fill(self, out: Tensor, image: int, draw: Draw | None, unreadable: list[str]) -> int:
        """Write the pixels of `image`; returns its label.

        In training the next readable image takes the place of an unreadable one: the same one
        whatever rank or worker loads it, and the minibatch keeps its size. In evaluation nothing
        does: black pixels and the label UNREADABLE.
        """
        for candidate in range(image, image + GIVE_UP_AFTER):
            candidate %= len(self)
            try:
                rgb = self.decode(self.source.read(candidate))
            except (Unreadable, OSError) as error:
                unreadable.append(f"{self.source.path(candidate)}: {error}")
                if draw is None:
                    out.zero_()
                    return UNREADABLE
            else:
                out.copy_(self.transform(rgb, draw, candidate))
                return int(self.source.labels[candidate])
        raise UnreadableImageError(
            f"{GIVE_UP_AFTER} images in a row cannot be read, from {self.source.path(image)} on"
        )


class Files:
    """A part on disk. Its processes are kept for the next epoch."""

    def __init__(self, reader: Reader, normalisation: Normalisation, loading: Loading) -> None:
        self.reader, self.loading = reader, loading
        self.normalisation: Normalisation | None = normalisation
        self._idle: dict[bool, list[Processes]] = {True: [], False: []}  # by pin_memory
        self._reported: set[str] = set()

    def __len__(self) -> int:
        return len(self.reader)

    def load(self, requests: Iterable[Request], pin_memory: bool = False) -> Iterator[Loaded]:
        loading, idle = self.loading, self._idle[pin_memory]
        processes = (
            idle.pop()
            if idle
            else Processes(self.reader, loading.workers, loading.ahead, pin_memory)
        )
        try:
            for loaded in processes.answers(requests):
                self._judge(loaded.unreadable)
                yield loaded
        finally:  # also when nobody has asked whether there is another one
            if processes.are_idle:
                idle.append(processes)

    def _judge(self, unreadable: tuple[str, ...]) -> None:
        for message in unreadable:
            if not self.loading.skip_unreadable:
                raise UnreadableImageError(
                    f"cannot read the image {message}; replace it, or give --corrupt-images skip"
                )
            if message not in self._reported:
                self._reported.add(message)
                log.warning("skipped: cannot read the image %s", message)
