"""One file that continues a run to the same bits, or is refused with a reason.

The file is an ordinary `torch.save` zip of tensors, numbers and strings: `torch.load(path,
weights_only=True)["model"]` is the network. It is written beside its name, synced and renamed, so a
reader sees the old file or the new one; a digest over the content finds what a disk or a copy
damaged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyallreduce as par

FORMAT = 1


@dataclasses.dataclass
class TrainState:
    """What an iteration changes, and nothing else.

    `errors` maps a finished epoch to its held-out error in percent; it is the same on every rank.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    errors: dict[int, float] = dataclasses.field(default_factory=dict)


def save(
    path: Path | None,
    state: TrainState,
    identity: dict[str, Any],
    comm: par.Communicator,
    *,
    torn: bool,
) -> None:
    """Collective: gathers every rank's statistics and generators, rank 0 writes `path`.

    `torn` weights (an eager update that failed half way) are no state of the run: RuntimeError.
    """
    if torn:
        raise RuntimeError(
            "not writing a checkpoint: an update failed half way, so the parameters "
            "are neither those before nor those after it; resume from the last file"
        )
    ranks = _gather(_own(state.model), comm)
    if path is None:  # ranks other than 0
        return
    content = {
        "format": FORMAT,
        "identity": identity,
        "step": state.step,
        "errors": state.errors,
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "ranks": ranks,
    }
    _write(path, {**content, "sha256": digest(content)})


def load(path: Path | None, identity: dict[str, Any], comm: par.Communicator) -> dict[str, Any]:
    """Collective: the checked content of rank 0's `path` on every rank; only rank 0 reads it.

    UsageError on every rank when the file cannot be read, is damaged, or belongs to another run.
    """
    data, reason = b"", ""
    if comm.rank == 0:
        try:
            assert path is not None
            data = path.read_bytes()
        except OSError as error:
            reason = str(error.strerror)
    data = _broadcast_bytes(data, comm)
    if not data:
        raise par.UsageError(
            f"--resume: given {path}, which cannot be read ({reason or 'empty'}); "
            "accepted: a checkpoint.pt written by this trainer, its run directory, "
            "or auto"
        )
    content = _decode(data, path)
    _check_identity(content["identity"], identity, path)
    return content


def read(path: Path) -> dict[str, Any]:
    """The checked content of a checkpoint, whoever wrote it. UsageError when there is no intact one."""
    try:
        return _decode(path.read_bytes(), path)
    except OSError as error:
        raise par.UsageError(
            f"{path} cannot be read ({error.strerror}); give a run directory or a checkpoint in it"
        ) from None


def restore(state: TrainState, content: dict[str, Any], comm: par.Communicator) -> None:
    """Put this rank's part of the content into the live objects, after hooks have been attached."""
    state.model.load_state_dict(content["model"])
    state.optimizer.load_state_dict(content["optimizer"])
    own = content["ranks"][comm.rank]
    with torch.no_grad():
        for name, buffer in state.model.named_buffers():
            buffer.copy_(own[name])
    torch.set_rng_state(own["/rng"])
    state.step = content["step"]
    state.errors = dict(content["errors"])


def digest(content: Any) -> str:
    """SHA-256 over nested containers, numbers, strings and tensors, whatever the zip around them."""
    sha = hashlib.sha256()
    for piece in _pieces(content):
        sha.update(piece)
    return sha.hexdigest()


def _pieces(value: Any) -> Iterator[bytes | memoryview]:
    if isinstance(value, dict):
        yield f"dict {len(value)}".encode()
        for key, item in value.items():
            yield repr(key).encode()
            yield from _pieces(item)
    elif isinstance(value, list | tuple):
        yield f"list {len(value)}".encode()
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield _bytes_of(value).numpy().data
    else:
        yield repr(value).encode()


def _bytes_of(tensor: Tensor) -> Tensor:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


def _own(model: nn.Module) -> dict[str, Tensor]:
    """What differs between ranks: batch-norm statistics (never synchronised) and the generator.

    "/" cannot appear in a buffer's name.
    """
    return {**dict(model.named_buffers()), "/rng": torch.get_rng_state()}


def _gather(own: dict[str, Tensor], comm: par.Communicator) -> list[dict[str, Tensor]]:
    """Every rank's tensors; their names and shapes are equal everywhere, so one buffer carries all."""
    packed = torch.cat([_bytes_of(t) for t in own.values()])
    everyone = torch.empty(comm.size * packed.numel(), dtype=torch.uint8)
    comm.all_gather(everyone, packed)
    result = []
    for row in everyone.view(comm.size, -1):
        parts = row.split([t.numel() * t.element_size() for t in own.values()])
        # clone: a view with an odd offset cannot be read as a wider type.
        result.append(
            {
                name: part.clone().view(t.dtype).view(t.shape)
                for (name, t), part in zip(own.items(), parts, strict=True)
            }
        )
    return result


def _broadcast_bytes(data: bytes, comm: par.Communicator) -> bytes:
    length = torch.tensor([len(data)])
    comm.broadcast(length, root=0)
    if length.item() == 0:
        return b""
    payload = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if comm.rank == 0
        else torch.empty(int(length.item()), dtype=torch.uint8)
    )
    comm.broadcast(payload, root=0)
    return payload.numpy().tobytes()


def _decode(data: bytes, path: Path | None) -> dict[str, Any]:
    try:
        content = torch.load(io.BytesIO(data), weights_only=True)
        stored = content.pop("sha256")
        known = content["format"] == FORMAT
        intact = stored == digest(content)
    except Exception as error:  # a damaged zip or pickle fails in many ways, all of them mean this
        raise par.UsageError(
            f"--resume: {path} is damaged or not a checkpoint of this trainer "
            f"({type(error).__name__}: {str(error).partition('.')[0]}); "
            "give an intact file, or leave --resume out to start a new run"
        ) from None
    if not known:
        raise par.UsageError(
            f"--resume: {path} has format {content['format']}, accepted: {FORMAT}; "
            "resume it with the version that wrote it"
        )
    if not intact:
        raise par.UsageError(
            f"--resume: {path} is damaged: its content does not match its checksum; "
            "give an intact file, or leave --resume out to start a new run"
        )
    return content


def _check_identity(stored: dict[str, Any], mine: dict[str, Any], path: Path | None) -> None:
    for key in mine:
        if stored.get(key) != mine[key]:
            raise par.UsageError(
                f"--resume: {path} was written with {key} = {stored.get(key)}, this run has "
                f"{mine[key]}; run with the old value, or leave --resume out to start a new run"
            )


def _write(path: Path, content: dict[str, Any]) -> None:
    """All or nothing, also across a power cut: first the data, then the name, then the directory."""
    # A fixed name: what a killed run left behind is overwritten by the next one.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
