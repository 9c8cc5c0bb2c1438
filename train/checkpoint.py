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
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyallreduce as par
from train.collective import Failure, by_rank_0

FORMAT = 2


@dataclasses.dataclass
class TrainState:
    """What an iteration changes, and nothing else.

    `errors` maps an evaluated epoch to its held-out error in percent; it is the same on every rank.
    `evaluated` is the iteration of the last evaluation, `recomputed` the batch-norm statistics that it
    made by itself, for those who export them. `sums` are the epoch's so far, of this rank
    (metrics.Meter says of what).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    evaluated: int = 0
    errors: dict[int, float] = dataclasses.field(default_factory=dict)
    recomputed: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    sums: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    scaler: torch.amp.GradScaler = dataclasses.field(
        default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False)
    )


def collect(
    state: TrainState,
    identity: dict[str, Any],
    comm: par.Communicator,
    *,
    torn: bool,
    plan: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Collective: all that a checkpoint has to hold, every rank's statistics and generators too.

    Refused on all ranks: `torn` weights, of an eager update that failed half way (Failure);
    replicas that differ (MismatchError); weights or statistics that are not finite
    (FloatingPointError).
    """
    if torn:
        raise Failure(
            "not writing a checkpoint: an update failed half way, so the parameters "
            "are neither those before nor those after it; resume from the last file"
        )
    replica = {"model": dict(state.model.named_parameters()), "optimizer": _optimizer(state)}
    findings = {
        "/finite": torch.tensor([_is_finite(state.model)], dtype=torch.uint8),
        "/replica": torch.frombuffer(bytearray.fromhex(digest(replica)), dtype=torch.uint8),
    }
    ranks = _gather({**_own(state), **findings}, comm)
    _check_finite([rank.pop("/finite") for rank in ranks], state.step)
    _check_replicas([rank.pop("/replica") for rank in ranks], state.step)
    return {
        "format": FORMAT,
        "identity": identity,
        "plan": plan or {},
        "step": state.step,
        "evaluated": state.evaluated,
        "errors": dict(state.errors),
        "model": _on_cpu(state.model.state_dict()),
        # Those of other weights are of no use to anyone.
        "recomputed": state.recomputed if state.evaluated == state.step else {},
        "optimizer": _on_cpu(_optimizer(state)),
        "scaler": state.scaler.state_dict(),
        "ranks": ranks,
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """All or nothing, also across a power cut: first the data, then the name, then the directory.

    OSError when the disk is full; what was there is as it was.
    """
    # In memory first: torch's zip writer turns a full disk into an error about positions.
    buffer = io.BytesIO()
    torch.save({**content, "sha256": digest(content)}, buffer)
    # A fixed name: what a killed run left behind is overwritten by the next one.
    temporary = path.with_name(".checkpoint.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
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


def read(path: Path) -> dict[str, Any]:
    """The checked content of a checkpoint, whoever wrote it. UsageError when there is no intact one."""
    return _decode(_read_bytes(path), path)


def newest_intact(files: Sequence[Path]) -> Path:
    """The first of the files, newest first, that is whole; stderr names those that are not.

    UsageError when none is, with what is wrong with the first.
    """
    first: par.UsageError | None = None
    for path in files:
        try:
            read(path)
        except par.UsageError as error:
            first = first or error
            if path != files[-1]:
                print(f"warning: {error}; trying the one before", file=sys.stderr)
        else:
            return path
    raise first or par.UsageError("there is no checkpoint")


def load(path: Path | None, comm: par.Communicator) -> dict[str, Any]:
    """Collective: the checked content of rank 0's `path` on every rank; only rank 0 reads it."""
    data = by_rank_0(comm, lambda: _read_bytes(path) if path else b"")
    return _decode(data, path)


def restore(state: TrainState, content: dict[str, Any], comm: par.Communicator) -> None:
    """Put this rank's part of the content into the live objects, after hooks have been attached.

    On another number of ranks than wrote it, new ranks continue with the statistics of the last.
    """
    state.model.load_state_dict(content["model"])
    state.optimizer.load_state_dict(content["optimizer"])
    if content["scaler"]:  # empty unless the precision is fp16
        state.scaler.load_state_dict(content["scaler"])
    ranks = content["ranks"]
    own = ranks[min(comm.rank, len(ranks) - 1)]
    with torch.no_grad():
        for name, buffer in state.model.named_buffers():
            buffer.copy_(own[name])
    torch.set_rng_state(own["/rng"])
    if "/cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["/cuda"])
    if len(ranks) == comm.size:
        state.sums.copy_(own["/sums"])
    elif comm.rank == 0:  # their total is what counts
        state.sums.copy_(torch.stack([rank["/sums"] for rank in ranks]).sum(0))
    state.step, state.evaluated = content["step"], content["evaluated"]
    state.errors = dict(content["errors"])
    state.recomputed = content.get("recomputed", {})  # earlier versions kept none


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


def _on_cpu(value: Any) -> Any:
    """Nested containers with their tensors in memory that every machine has."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return [_on_cpu(item) for item in value] if isinstance(value, list) else value


def _optimizer(state: TrainState) -> dict[str, Any]:
    """Without what torch's `load_state_dict` adds to the groups: else a resumed run's would differ."""
    saved = state.optimizer.state_dict()
    known = state.optimizer.defaults.keys() | {"params"}
    groups = [{k: v for k, v in g.items() if k in known} for g in saved["param_groups"]]
    return {"state": saved["state"], "param_groups": groups}


def _own(state: TrainState) -> dict[str, Tensor]:
    """What differs between ranks: batch-norm statistics (never synchronised), the generators, sums.

    "/" cannot appear in a buffer's name.
    """
    own = {**dict(state.model.named_buffers()), "/rng": torch.get_rng_state(), "/sums": state.sums}
    on_gpu = next(state.model.parameters()).is_cuda
    return {**own, "/cuda": torch.cuda.get_rng_state()} if on_gpu else own


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


def _is_finite(model: nn.Module) -> bool:
    floats = (t for t in model.state_dict().values() if t.is_floating_point())
    return all(bool(t.isfinite().all()) for t in floats)


def _check_finite(finite: Sequence[Tensor], step: int) -> None:
    if bad := [rank for rank, flag in enumerate(finite) if not flag.item()]:
        raise FloatingPointError(
            f"not writing a checkpoint: weights or batch-norm statistics of rank {bad[0]} are not "
            f"finite after iteration {step}; resume from the last file with a lower --lr"
        )


def _check_replicas(digests: Sequence[Tensor], step: int) -> None:
    if odd := [r for r, mine in enumerate(digests) if not torch.equal(mine, digests[0])]:
        raise par.MismatchError(
            f"not writing a checkpoint: after iteration {step} rank {odd[0]} has other weights or "
            "momentum than rank 0; resume from the last file, and look for what wrote them",
            odd,
        )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise par.UsageError(
            f"{path} cannot be read ({error.strerror}); give a run directory or a checkpoint in it"
        ) from None


def _decode(data: bytes, path: Path | None) -> dict[str, Any]:
    try:
        content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        stored = content.pop("sha256")
        known = content["format"] == FORMAT
        intact = stored == digest(content)
    except Exception as error:  # a damaged zip or pickle fails in many ways, all of them mean this
        raise par.UsageError(
            f"{path} is damaged or not a checkpoint of this trainer "
            f"({type(error).__name__}: {str(error).partition('.')[0]}); "
            "give an intact file"
        ) from None
    if not known:
        raise par.UsageError(
            f"{path} has format {content['format']}, accepted: {FORMAT}; "
            "use the version that wrote it"
        )
    if not intact:
        raise par.UsageError(
            f"{path} is damaged: its content does not match its checksum; give an intact file"
        )
    return content
