"""Compressed bytes -> RGB pixels, by the fastest library that is installed.

All decoders here wrap libjpeg-turbo with its exact transform and give the same pixels, so the
choice changes no run; a test holds them to that. Measured on one core of an AMD EPYC with AVX2,
photographs of 500x333: simplejpeg 793 images/s, torchcodec 779, torchvision.io 765 (deprecated), Pillow 580.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
from collections.abc import Callable

import numpy as np

from pyallreduce import UsageError

Decode = Callable[[bytes], np.ndarray]


class Unreadable(Exception):
    """These bytes are no image that any decoder here reads."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """`decode(data)`: RGB pixels [H, W, 3] uint8, or Unreadable."""

    name: str
    fast: Decode | None

    def __call__(self, data: bytes) -> np.ndarray:
        if self.fast:
            try:
                return self.fast(data)
            except Exception:  # each has its own; Pillow decides what is an image:
                pass  # it also reads PNG, CMYK and the odd ImageNet JPEG with a wrong name
        try:
            return _with_pillow(data)
        except Exception as error:
            raise Unreadable(str(error) or type(error).__name__) from None


def _with_pillow(data: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))  # a copy: asarray would be read-only


def _simplejpeg() -> Decode:
    import simplejpeg

    def decode(data: bytes) -> np.ndarray:
        if simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK"):
            raise ValueError("CMYK: converted with other rounding than Pillow's")
        return simplejpeg.decode_jpeg(data, "RGB")

    return decode


def _torchcodec() -> Decode:
    import torch
    from torchcodec.decoders import ImageReadMode, decode_jpeg

    def decode(data: bytes) -> np.ndarray:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return decode_jpeg(encoded, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()

    return decode


# The fastest first.
FAST: dict[str, Callable[[], Decode]] = {"simplejpeg": _simplejpeg, "torchcodec": _torchcodec}


def decoder(choice: str = "auto") -> Decoder:
    """The decoder of that name; `auto`: the fastest that can be imported. UsageError if it cannot."""
    for name, make in FAST.items():
        if choice in (name, "auto"):
            try:
                return Decoder(f"{name} {importlib.metadata.version(name)}", make())
            except (ImportError, OSError, RuntimeError) as error:
                if choice == name:
                    raise UsageError(
                        f"--decoder: given {name!r}, which cannot be imported ({error}); accepted: "
                        f"auto, {', '.join(FAST)}, pillow; run: pip install {name}"
                    ) from None
    return Decoder(f"Pillow {importlib.metadata.version('pillow')}", None)
