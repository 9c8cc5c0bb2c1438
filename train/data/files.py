"""Images on disk: read, decoded and augmented by worker processes, batch by batch."""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import logging
import signal
import warnings
import weakref
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import pyallreduce as par
from train.data.decode import Decoder, Unreadable
from train.data.images import UNREADABLE, Draw, Loaded, Normalisation, Request, one_thread
from train.data.sources import Source
from train.data.transforms import Transform

# After SIGTERM the rank may still write a checkpoint, for which it needs no more images, but a
# worker that died under it would be an error. So workers outlive the signal, though not for ever.
OUTLIVE_SIGTERM_S = 120
# So many unreadable images after one another are no accident of single files.
GIVE_UP_AFTER = 100
_PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


class UnreadableImageError(par.Error):
    """An image cannot be decoded, and --corrupt-images is not skip."""


@dataclasses.dataclass(frozen=True)
class Loading:
    """How images are loaded; changes the speed and no pixel. `ahead`: batches per worker."""

    workers: int
    ahead: int = 2
    skip_unreadable: bool = False


class Files(Dataset[Loaded]):
    """A source with its decoder and transform, as a torch data set of whole batches."""

    def __init__(
        self,
        source: Source,
        decoder: Decoder,
        transform: Transform,
        normalisation: Normalisation,
        loading: Loading,
    ) -> None:
        self.normalisation: Normalisation | None = normalisation
        self.source, self.decode, self.transform = source, decoder, transform
        self.loading = loading
        self._reported: set[str] = set()

    def __len__(self) -> int:
        return len(self.source.labels)

    def load(self, requests: Iterable[Request], pin_memory: bool = False) -> Iterator[Loaded]:
        loading = self.loading
        for loaded in in_workers(self, requests, loading.workers, loading.ahead, pin_memory):
            self._judge(loaded.unreadable)
            yield loaded

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

    def _judge(self, unreadable: tuple[str, ...]) -> None:
        for message in unreadable:
            if not self.loading.skip_unreadable:
                raise UnreadableImageError(
                    f"cannot read the image {message}; replace it, or give --corrupt-images skip"
                )
            if message not in self._reported:
                self._reported.add(message)
                log.warning("skipped: cannot read the image %s", message)


_open: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


def in_workers(
    items: Any, requests: Iterable[Any], workers: int, ahead: int, pin_memory: bool = False
) -> Iterator[Any]:
    """items[request] for each request, in order, by that many processes (0: here)."""
    answers = _answers(items, requests, workers, ahead, pin_memory)
    _open.add(answers)
    return answers


def _answers(
    items: Any, requests: Iterable[Any], workers: int, ahead: int, pin_memory: bool
) -> Generator[Any, None, None]:
    with warnings.catch_warnings():
        # More processes than cores: said anew in each epoch; data-bench measures what is best.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: Any = DataLoader(
            items,
            sampler=requests,
            batch_size=None,  # a request is a whole batch
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            worker_init_fn=_prepare_worker,
            pin_memory=pin_memory,
            # Else it would take its seed from torch's own generator, a part of the checkpoint.
            generator=torch.Generator(),
            # A worker starts in milliseconds and shares the index; the core closes what is its own.
            multiprocessing_context="fork" if workers else None,
        )
        answers = iter(loader)
    # Anew behind torch's own registration, so that it runs before that one.
    atexit.unregister(_close_all)
    atexit.register(_close_all)
    yield from answers


def _close_all() -> None:
    """At exit. Python would send its children SIGTERM, which ours outlive, and wait for them."""
    for answers in list(_open):
        answers.close()


def _as_it_is(batch: Any) -> Any:
    return batch


def _prepare_worker(worker: int) -> None:
    """Signals are for the rank, which ends its workers; they end by themselves when it is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(OUTLIVE_SIGTERM_S))
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
