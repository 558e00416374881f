"""A sample's cached latents: one file of tensors beside its pixels (docs/cache.md).

    moments     (T, M, h, w)  mean and log-variance of the autoencoder's posterior, unscaled, so that it is
                              sampled anew each time
    frames      (bytes,)      the frames that were encoded, each a JPEG: a clip needs its first as pixels
    frame_ends  (T,)          where in `frames` each ends

Of all stored frames, so that stride and start stay free. The crop is centred.

Shape legend: T frames, M = 2C moments of C latent channels, h x w latent pixels, H x W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from svd_ds.data import cached_tensors
from svd_ds.data.cached_tensors import TensorFile

MEMBER = "latents.safetensors"
"""Extension of a sample's latents."""
MAX_MOMENT = 1000.0
"""Means of the public autoencoder have a standard deviation of 5.5; log-variances are clipped to 20."""
JPEG_QUALITY = 98
"""With whole chroma: off by half a level of 255 on average, a tenth of the noise that is put on the frame."""


@dataclass(frozen=True)
class LatentsOrigin:
    """What the moments were made of and by."""

    height: int
    """Of the frames that were encoded, in pixels."""
    width: int
    autoencoder: str
    """See `Autoencoder.fingerprint`."""


def pack(moments_TMhw: Tensor, frames_TCHW: Tensor, origin: LatentsOrigin) -> bytes:
    """The file's bytes, of moments, rounded to float16, and the uint8 frames that they were made of.

    Raises ValueError for moments that are not finite then, or that `check_moments` refuses.
    """
    jpegs = [_to_jpeg(frame_CHW) for frame_CHW in frames_TCHW]
    joined = np.frombuffer(b"".join(jpegs), dtype=np.uint8).copy()
    stored = {
        "moments": moments_TMhw,
        "frames": torch.from_numpy(joined),
        "frame_ends": torch.tensor([len(jpeg) for jpeg in jpegs]).cumsum(0),
    }
    packed = cached_tensors.pack(stored, asdict(origin))
    check_moments(moments_TMhw)
    return packed


def read_origin(file: TensorFile) -> LatentsOrigin:
    """Raises ValueError where the file is not of `pack`."""
    try:
        return LatentsOrigin(**file.origin)
    except TypeError as error:
        raise ValueError(f"its {MEMBER} does not say what it was made of") from error


def moments_shape(file: TensorFile) -> tuple[int, ...]:
    """(M, h, w) of the moments. Raises ValueError where there are none."""
    return file.shapes().get("moments", ())[1:]


def read_moments(file: TensorFile, frames: Sequence[int]) -> Tensor:
    """The moments of some of the stored frames, float16 (T, M, h, w).

    Raises ValueError where the file is damaged or has too few frames.
    """
    return check_moments(file.rows("moments", frames))


def check_moments(moments: Tensor) -> Tensor:
    """The moments.

    Raises:
        ValueError: they are not finite, or so large that no autoencoder made them.
    """
    # NaN is not below the limit.
    if not bool((moments.abs() <= MAX_MOMENT).all()):
        raise ValueError(f"its moments are not finite, or beyond {MAX_MOMENT:g}")
    return moments


def read_frames(file: TensorFile, frames: Sequence[int]) -> Tensor:
    """The pixels of some of the stored frames, uint8 (T, 3, H, W). Raises as `read_moments` does."""
    ends = [0, *file.tensor("frame_ends").tolist()]
    origin = read_origin(file)
    pixels = []
    for frame in frames:
        jpeg = file.rows("frames", range(ends[frame], ends[frame + 1])).numpy().tobytes()
        try:
            with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
                if image.mode != "RGB" or image.size != (origin.width, origin.height):
                    raise OSError(f"frame {frame} is of {image.height} x {image.width} pixels")
                pixels.append(torch.from_numpy(np.array(image)))
        except OSError as error:
            raise ValueError(f"its {MEMBER} is damaged ({error})") from error
    return torch.stack(pixels).permute(0, 3, 1, 2)


def _to_jpeg(frame_CHW: Tensor) -> bytes:
    buffer = io.BytesIO()
    pixels = frame_CHW.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
