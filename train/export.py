"""`python -m train export RUN --out model.safetensors`: a run's weights without the run.

A safetensors file holds tensors and strings, no code; names and shapes are those of the network's
`state_dict`, so `torchvision.models` loads ours of its vocabulary as they are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyallreduce import UsageError
from train import checkpoint
from train.config import Parser
from train.rundir import checkpoints_in


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m train export",
        description="Write the weights of a run's newest checkpoint as a safetensors file, with worker "
        "0's batch-norm statistics, or the recomputed ones if it was evaluated under such.",
    )
    parser.add_argument("run", type=Path, help="run directory, or one of its checkpoints")
    parser.add_argument(
        "--out", type=Path, default=None, help="file to write (default: RUN/weights.safetensors)"
    )
    given = parser.parse_args(argv)
    source = checkpoint.newest_intact(checkpoints_in(given.run))
    out = given.out or (given.run if given.run.is_dir() else source.parent) / "weights.safetensors"
    content = checkpoint.read(source)
    tensors = weights({**content["model"], **_recomputed(content)})
    about = description(content)
    write(out, tensors, about)
    print(
        f"exported {source} (iteration {content['step']}): {len(tensors)} tensors to {out}, batch norm "
        f"by statistics: {about['bn_statistics']}"
    )
    print(how_to_load(content["identity"].get("model"), tensors, out))
    return 0


def weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: the format knows no strides."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state_dict.items()
    }


def _recomputed(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Batch-norm statistics of the last evaluation, if it made its own of these weights."""
    return content.get("recomputed", {})  # earlier versions kept none


def description(content: Mapping[str, Any]) -> dict[str, str]:
    """What the file says about its origin."""
    identity = content["identity"]
    known = {
        key: identity[key] for key in ("model", "dataset", "preset", "seed") if key in identity
    }
    return {
        **{key: str(value) for key, value in known.items()},
        "iteration": str(content["step"]),
        "bn_statistics": "recomputed" if _recomputed(content) else "worker0",
    }


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Whole or not at all. UsageError when safetensors is missing or the place is not writable."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise UsageError(
            f"safetensors cannot be imported ({error}); run: pip install 'pyallreduce[train]'"
        ) from None
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UsageError(f"--out: {path} cannot be written ({error})") from None


def how_to_load(model: str | None, tensors: Mapping[str, Tensor], path: Path) -> str:
    """Python that loads the file: torchvision's network where names and shapes are the same."""
    classes = len(tensors["fc.bias"]) if "fc.bias" in tensors else None
    if model and fits_torchvision(model, tensors):
        network = f"torchvision.models.{model}(num_classes={classes})"
    else:
        network = f"train.models.build({model!r}, {classes})"
    return (
        f"network = {network}; network.load_state_dict(safetensors.torch.load_file({str(path)!r}))"
    )


def fits_torchvision(model: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether torchvision has a network of this name with exactly these names and shapes."""
    from torchvision import models

    if model not in models.list_models() or "fc.bias" not in tensors:
        return False
    with torch.device("meta"):  # shapes without memory
        network = models.get_model(model, num_classes=len(tensors["fc.bias"]))
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    return expected == {name: tensor.shape for name, tensor in tensors.items()}
