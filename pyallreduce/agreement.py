"""What all ranks must say alike before they train together; if they do not, all of them learn where they differ."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import zip_longest

import torch

from pyallreduce.communicator import Communicator
from pyallreduce.errors import MismatchError


def check_agreement(comm: Communicator, lines: list[str]) -> None:
    """Collective. MismatchError on all ranks, now and from then on, unless the ``lines`` of all are equal.

    It names the ranks that differ from the majority (a tie: from rank 0), and where each of them first does. Costs an
    all_gather of 16 bytes; only ranks that disagree exchange their lines.
    """
    text = "\n".join(lines).encode()
    digest = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)
    digests, lengths = _gathered(comm, torch.tensor([digest, len(text)])).T.tolist()
    if len(set(digests)) == 1:
        return
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = _gathered(comm, padded).numpy()
    texts = [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]
    error = _disagreement(texts)
    comm.core.raise_mismatch(str(error), error.peers)


def _gathered(comm: Communicator, mine: torch.Tensor) -> torch.Tensor:
    of_all = torch.empty(comm.size * mine.numel(), dtype=mine.dtype)
    comm.all_gather(of_all, mine)
    return of_all.view(comm.size, -1)


def _disagreement(texts: list[str]) -> MismatchError:
    (right, most), *others = Counter(texts).most_common()
    if others and others[0][1] == most:
        right = texts[0]
    odd = [rank for rank, text in enumerate(texts) if text != right]
    usual = texts.index(right)
    differences = "; ".join(
        f"rank {rank} has {_first_difference(texts[rank], right, f'rank {usual}')}"
        for rank in odd[:3]
    )
    more = f", and {len(odd) - 3} ranks more" if len(odd) > 3 else ""
    return MismatchError(f"the ranks' modules or options differ: {differences}{more}", odd)


def _first_difference(text: str, right: str, usual: str) -> str:
    for mine, theirs in zip_longest(text.split("\n"), right.split("\n"), fillvalue="nothing more"):
        if mine != theirs:
            return f"{mine}, where {usual} has {theirs}"
    raise AssertionError("equal texts")
