"""Inputs of the paper's stages other than clips, at the size of debug=tiny: an image model, and orbits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from svd_ds.data.writer import ShardWriter
from svd_ds.video import write_mp4

NUM_VIEWS, SIZE, FPS = 21, 64, 7
"""Frames of an orbit, height and width of a frame in pixels, and frames per second."""


def image_unet() -> UNet2DConditionModel:
    """Build a UNet like Stable Diffusion 2.1's, with the widths of debug=tiny and random weights."""
    return UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        down_block_types=["CrossAttnDownBlock2D"] * 2,
        up_block_types=["CrossAttnUpBlock2D"] * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=[1, 2],
        use_linear_projection=True,
    )


def write_image_model(folder: Path) -> None:
    """Write the image model as a diffusers folder; its weights are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image_unet().save_pretrained(folder)


def write_orbits(folder: Path, num_orbits: int = 4) -> None:
    """Write shards of orbits around chequered balls, seen from elevations between -5 and 30 degrees, the
    paper's range (arXiv 2311.15127 D.6)."""
    writer = ShardWriter(folder)
    for i, elevation in enumerate(np.linspace(-5.0, 30.0, num_orbits).tolist()):
        video = folder / "orbit.mp4"
        write_mp4(_orbit(elevation, num_cells=i + 2), video, FPS)
        metadata = {
            "captions": {"text": "a ball that turns"},
            "num_frames": NUM_VIEWS,
            "fps": FPS,
            "height": SIZE,
            "width": SIZE,
            "motion": 0.1,
            "elevation": elevation,
        }
        writer.add(f"orbit-{i}", "mp4", video.read_bytes(), metadata)
        video.unlink()
    writer.close()


def _orbit(elevation: float, num_cells: int) -> torch.Tensor:
    """Render an orbit around a ball with `num_cells` cells from pole to pole: uint8 (T, 3, H, W)."""
    down, right = np.mgrid[-1.2 : 1.2 : SIZE * 1j, -1.2 : 1.2 : SIZE * 1j]
    is_ball = down**2 + right**2 < 1
    near = np.sqrt(np.where(is_ball, 1 - down**2 - right**2, 0))
    tilt = math.radians(elevation)
    # Rotate from the axes of the camera to those of the ball.
    up, front = near * math.sin(tilt) - down * math.cos(tilt), near * math.cos(tilt) + down * math.sin(tilt)
    latitude = np.arcsin(np.clip(up, -1, 1))
    frames = np.full((NUM_VIEWS, 3, SIZE, SIZE), 255, dtype=np.uint8)
    for frame, azimuth in zip(frames, np.arange(NUM_VIEWS) * 2 * math.pi / NUM_VIEWS, strict=True):
        longitude = np.arctan2(right, front) + azimuth
        cells = np.floor(latitude * num_cells / math.pi) + np.floor(longitude * num_cells / math.pi)
        frame[:, is_ball] = np.where(cells[is_ball] % 2, [[200], [60], [40]], [[40], [70], [160]])
    return torch.from_numpy(frames)
