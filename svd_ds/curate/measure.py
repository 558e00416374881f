"""Stages that measure a clip's frames without a model: motion score and perceptual hashes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa

from svd_ds.curate.flow import FLOW_FPS, motion_score
from svd_ds.curate.raw import RawFile
from svd_ds.curate.stages import StageContext
from svd_ds.curate.table import Row, RowsByStage
from svd_ds.data.decoding import decode
from svd_ds.pixels.frame import to_rgb

MOTION = {"id": pa.string(), "motion": pa.float64()}
HASH = {"id": pa.string(), "hashes": pa.list_(pa.uint64())}
HASH_SIDE = 32
"""Side in pixels to which a frame is reduced before its perceptual hash is computed."""
HASH_FREQUENCIES = 8
"""Number of low frequencies along each side that the hash keeps: 8 x 8 = 64 bits."""


def score_motion(settings: None, file: RawFile, inputs: RowsByStage, context: StageContext) -> Iterator[Row]:
    """Yield the motion score of each clip, from frames half a second apart; 0 for an image."""
    for clip in inputs["clips"]:
        step = max(1, round(clip["fps"] / FLOW_FPS))
        num_frames = clip["end_frame"] - clip["start_frame"]
        # A clip too short for two such frames is measured between its first and last frame.
        numbers = range(0, num_frames, min(step, max(1, num_frames - 1)))
        frames = read_clip_frames(context.out / clip["media"], numbers)
        yield {"id": clip["id"], "motion": round(motion_score(frames, clip["fps"] / numbers.step), 6)}


def hash_frames(settings: None, file: RawFile, inputs: RowsByStage, context: StageContext) -> Iterator[Row]:
    """Yield perceptual hashes of each clip's first, middle and last frame."""
    for clip in inputs["clips"]:
        yield {
            "id": clip["id"],
            "hashes": [perceptual_hash(frame) for frame in read_three_frames(clip, context)],
        }


def perceptual_hash(frame: np.ndarray) -> int:
    """Return a 64-bit hash that two encodings of a picture share: low frequencies above their median."""
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:HASH_FREQUENCIES, :HASH_FREQUENCIES].ravel()
    bits = low > np.median(low)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def read_three_frames(clip: Row, context: StageContext) -> list[np.ndarray]:
    """Read the first, middle and last frame of a clip: uint8 RGB, (H, W, 3)."""
    last = clip["end_frame"] - clip["start_frame"] - 1
    return read_clip_frames(context.out / clip["media"], [0, last // 2, last])


def read_clip_frames(path: Path, numbers: Sequence[int]) -> list[np.ndarray]:
    """Read frames of a clip as the loader does: uint8 RGB, (H, W, 3).

    Raises:
        ValueError: a frame cannot be decoded.
    """
    return [to_rgb(frame).numpy() for frame in decode(path.read_bytes(), numbers)]
