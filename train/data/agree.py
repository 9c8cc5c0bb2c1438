"""All ranks have the same data set, or all of them stop and rank 0 says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from pyallreduce import Communicator, UsageError

# Bytes of a rank's answer: a fingerprint, or the beginning of what went wrong.
ANSWER = 1024


class _Fingerprinted(Protocol):
    @property
    def fingerprint(self) -> str: ...


T = TypeVar("T", bound=_Fingerprinted)


def on_every_rank(comm: Communicator, make: Callable[[], T]) -> T:
    """Collective: `make()` here, if it worked on every rank and gave equal fingerprints.

    Else UsageError on every rank: the first rank's that failed.
    """
    made: T | None = None
    try:
        made = make()
        answer = f"+{made.fingerprint}"
    except UsageError as error:
        answer = f"-{error}"
    answers = _all_gather(comm, answer)
    for rank, theirs in enumerate(answers):
        if theirs.startswith("-"):
            raise UsageError(theirs[1:] if rank == 0 else f"rank {rank}: {theirs[1:]}")
        if theirs != answers[0]:
            raise UsageError(
                f"--data-path: rank {rank} has another list of images than rank 0; accepted: the "
                "same files on every host; copy them again"
            )
    assert made is not None
    return made


def _all_gather(comm: Communicator, text: str) -> list[str]:
    own = torch.zeros(ANSWER, dtype=torch.uint8)
    data = text.encode()[:ANSWER]
    own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    everyone = torch.empty(comm.size * ANSWER, dtype=torch.uint8)
    comm.all_gather(everyone, own)
    rows = everyone.view(comm.size, ANSWER).numpy()
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]
