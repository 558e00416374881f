"""Cached latents of a sample: one file of tensors next to its pixels (docs/cache.md).

    moments     (T, M, h, w)  mean and log-variance of the autoencoder's posterior, unscaled; the posterior is
                              sampled anew whenever a clip is read
    frames      (bytes,)      the encoded frames as JPEGs: a clip needs its first frame as pixels
    frame_ends  (T,)          end of each JPEG in `frames`

All stored frames are included, so that a clip may have any stride and start. The crop is centred.

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
"""Extension of the file with a sample's latents."""
MAX_MOMENT = 1000.0
"""Largest valid moment. The means of the public autoencoder have a standard deviation of 5.5, and its
log-variances are clipped to 20."""
JPEG_QUALITY = 98
"""JPEG quality of the stored frames, without chroma subsampling: the mean error is half a level of 255, a
tenth of the noise that conditioning adds to the frame."""


@dataclass(frozen=True)
class LatentsOrigin:
    """Source of a file's latents: the size of the frames, and the autoencoder."""

    height: int
    """Height of the encoded frames in pixels."""
    width: int
    """Width of the encoded frames in pixels."""
    autoencoder: str
    """Fingerprint of the autoencoder, see `Autoencoder.fingerprint`."""


def pack(moments: Tensor, frames: Tensor, origin: LatentsOrigin) -> bytes:
    """Serialize the latents of a sample.

    Args:
        moments: moments of all stored frames, float, (T, M, h, w); they are rounded to float16.
        frames: the frames that were encoded, uint8 RGB, (T, 3, H, W).
        origin: source of the latents.

    Returns:
        The bytes of the file.

    Raises:
        ValueError: a moment is not finite in float16, or too large (`check_moments`).
    """
    jpegs = [_to_jpeg(frame_CHW) for frame_CHW in frames]
    joined = np.frombuffer(b"".join(jpegs), dtype=np.uint8).copy()
    stored = {
        "moments": moments,
        "frames": torch.from_numpy(joined),
        "frame_ends": torch.tensor([len(jpeg) for jpeg in jpegs]).cumsum(0),
    }
    packed = cached_tensors.pack(stored, asdict(origin))
    check_moments(moments)
    return packed


def read_origin(file: TensorFile) -> LatentsOrigin:
    """Return the source of a file's latents.

    Raises:
        ValueError: `pack` did not write the file.
    """
    return file.parse_origin(LatentsOrigin)


def moments_shape(file: TensorFile) -> tuple[int, ...]:
    """Return the shape (M, h, w) of the moments of a frame.

    Raises:
        ValueError: the file is damaged.
    """
    return file.shapes().get("moments", ())[1:]


def read_moments(file: TensorFile, frames: Sequence[int]) -> Tensor:
    """Read the moments of some of the stored frames.

    Args:
        file: file of a sample's latents.
        frames: ascending frame numbers.

    Returns:
        Moments, float16, (T, M, h, w).

    Raises:
        ValueError: the file is damaged or has too few frames.
    """
    return check_moments(file.rows("moments", frames))


def check_moments(moments: Tensor) -> Tensor:
    """Return the moments, of any shape, after checking them.

    Raises:
        ValueError: a moment is not finite, or larger than MAX_MOMENT in magnitude.
    """
    # NaN compares as False.
    if not bool((moments.abs() <= MAX_MOMENT).all()):
        raise ValueError(f"its moments are not finite, or larger than {MAX_MOMENT:g} in magnitude")
    return moments


def read_frames(file: TensorFile, frames: Sequence[int]) -> Tensor:
    """Read the pixels of some of the stored frames.

    Args:
        file: file of a sample's latents.
        frames: frame numbers.

    Returns:
        uint8 RGB, (T, 3, H, W).

    Raises:
        ValueError: the file is damaged or has too few frames.
    """
    ends = [0, *file.tensor("frame_ends").tolist()]
    origin = read_origin(file)
    pixels = []
    for frame in frames:
        jpeg = file.rows("frames", range(ends[frame], ends[frame + 1])).numpy().tobytes()
        try:
            with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
                if image.mode != "RGB" or image.size != (origin.width, origin.height):
                    raise OSError(f"frame {frame} has {image.height} x {image.width} pixels")
                pixels.append(torch.from_numpy(np.array(image)))
        except OSError as error:
            raise ValueError(f"its {MEMBER} is damaged ({error})") from error
    return torch.stack(pixels).permute(0, 3, 1, 2)


def _to_jpeg(frame_CHW: Tensor) -> bytes:
    """Encode a uint8 RGB frame, (3, H, W), as a JPEG."""
    buffer = io.BytesIO()
    pixels = frame_CHW.permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
