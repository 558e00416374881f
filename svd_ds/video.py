"""Images and videos on disk: previews, samples and the first frames of samples.

Shape legend: T frames, C = 3 RGB channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from svd_ds.pixels.still import read_still

MAX_COLUMNS = 8
"""Largest number of frames of a video on a contact sheet."""
GAP = 2
"""Gap between the frames of a contact sheet, in pixels."""


def to_uint8(frames: Tensor) -> Tensor:
    """Convert values in [-1, 1], clamped, of any shape, to uint8 on the CPU."""
    return ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def from_uint8(pixels: Tensor) -> Tensor:
    """Convert uint8 values, of any shape, to float32 in [-1, 1], contiguous, on the same device."""
    return pixels.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1


def read_image(path: Path, height: int, width: int) -> Tensor:
    """Read an image file, scaled to cover height x width and cropped at the centre.

    Returns:
        uint8, (3, H, W).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image that can be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no image {path}")
    try:
        image = Image.fromarray(read_still(path))
    except ValueError as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from error
    scale = max(height / image.height, width / image.width)
    scaled = image.resize(
        (max(width, round(image.width * scale)), max(height, round(image.height * scale))),
        Image.Resampling.LANCZOS,
    )
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    cropped = scaled.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1).contiguous()


def write_mp4(frames: Tensor, path: Path, fps: float) -> None:
    """Write an H.264 video that browsers play; a last odd row or column, which yuv420p lacks, is cut off.

    Args:
        frames: uint8, (T, 3, H, W).
        path: the file.
        fps: frames a second.
    """
    height, width = (size - size % 2 for size in frames.shape[2:])
    frames_THWC = frames[:, :, :height, :width].permute(0, 2, 3, 1).contiguous().cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": "17"}
        for frame_HWC in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode())


def contact_sheet(videos: Sequence[Tensor], path: Path) -> None:
    """Write a PNG with one row a video, of up to MAX_COLUMNS frames evenly spaced from first to last.

    Args:
        videos: uint8, each (T, 3, H, W).
        path: the file.
    """
    rows = []
    for frames_TCHW in videos:
        num_columns = min(MAX_COLUMNS, len(frames_TCHW))
        shown = torch.linspace(0, len(frames_TCHW) - 1, num_columns).round().long()
        rows.append(frames_TCHW[shown].cpu())
    height, width = (max(row.shape[axis] for row in rows) for axis in (2, 3))
    num_columns = max(len(row) for row in rows)
    sheet_HWC = np.full(
        (len(rows) * (height + GAP) - GAP, num_columns * (width + GAP) - GAP, 3), 255, dtype=np.uint8
    )
    for i, row in enumerate(rows):
        for j, frame_CHW in enumerate(row):
            top, left = i * (height + GAP), j * (width + GAP)
            frame_HWC = frame_CHW.permute(1, 2, 0).numpy()
            sheet_HWC[top : top + frame_HWC.shape[0], left : left + frame_HWC.shape[1]] = frame_HWC
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet_HWC).save(path)
