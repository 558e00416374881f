"""A sample's cached latents: one safetensors file beside its pixels (docs/data.md).

They are the moments of the autoencoder's posterior, mean and log-variance, unscaled, so that it is sampled
anew each time; and those of all stored frames, so that stride and start stay free. The crop is centred.

Shape legend: T frames, M = 2C moments of C latent channels, h x w latent pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

MEMBER = "latents.safetensors"
"""Extension of a sample's latents."""
HEADER_LENGTH_BYTES = 8
"""A safetensors file begins with its header's length, little-endian; then comes the header, as json."""


@dataclass(frozen=True)
class Origin:
    """What the moments were made of and by; kept in the file's metadata."""

    height: int
    """Of the frames that were encoded, in pixels."""
    width: int
    autoencoder: str
    """See `Autoencoder.fingerprint`."""


def pack(moments_TMhw: Tensor, origin: Origin) -> bytes:
    """The file's bytes; the moments are rounded to float16.

    Raises ValueError for moments that are not finite then.
    """
    stored = moments_TMhw.to("cpu", torch.float16).contiguous()
    if not stored.isfinite().all():
        raise ValueError("its latents are not finite in float16")
    # One entry: safetensors writes several in an order of its own each time.
    return safetensors.torch.save({"moments": stored}, {"origin": json.dumps(asdict(origin))})


def read_origin(content: bytes) -> Origin:
    """Raises ValueError where `content` is no file of `pack`."""
    try:
        length = int.from_bytes(content[:HEADER_LENGTH_BYTES], "little")
        header = json.loads(content[HEADER_LENGTH_BYTES : HEADER_LENGTH_BYTES + length])
        return Origin(**json.loads(header["__metadata__"]["origin"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its {MEMBER} does not say what it was made of") from error


def unpack(content: bytes, frames: Sequence[int]) -> Tensor:
    """The moments of some of the stored frames, float16 (T, M, h, w).

    Raises ValueError where the file is damaged or has too few frames.
    """
    try:
        moments_TMhw = safetensors.torch.load(content)["moments"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"its {MEMBER} is damaged ({error})") from error
    if frames[-1] >= len(moments_TMhw):
        raise ValueError(
            f"its {MEMBER} has {len(moments_TMhw)} frames, and the clip needs number {frames[-1]}"
        )
    return moments_TMhw[list(frames)]
