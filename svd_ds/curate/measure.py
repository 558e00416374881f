"""Stages that look at a clip's own frames and need no model: how much moves in it, what it looks like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa

from svd_ds.curate.flow import FLOW_FPS, motion_score
from svd_ds.curate.raw import RawFile
from svd_ds.curate.stages import Place
from svd_ds.curate.table import Known, Row
from svd_ds.data.decoding import decode
from svd_ds.pixels.frame import to_rgb

MOTION = {"id": pa.string(), "motion": pa.float64()}
HASH = {"id": pa.string(), "hashes": pa.list_(pa.uint64())}
HASH_SIDE = 32
"""Pixels to which a frame is reduced before its perceptual hash is taken ..."""
HASH_KEPT = 8
"""... and low frequencies along each side that the hash keeps: 64 bits."""


def score_motion(settings: None, file: RawFile, known: Known, place: Place) -> Iterator[Row]:
    """The motion score of each clip, from frames half a second apart; 0 for an image."""
    for clip in known["clips"]:
        step = max(1, round(clip["fps"] / FLOW_FPS))
        num_frames = clip["end_frame"] - clip["start_frame"]
        # A clip too short for two such frames is measured from its first to its last.
        numbers = range(0, num_frames, min(step, max(1, num_frames - 1)))
        frames = read_pictures(place.out / clip["media"], numbers)
        yield {"id": clip["id"], "motion": round(motion_score(frames, clip["fps"] / numbers.step), 6)}


def hash_frames(settings: None, file: RawFile, known: Known, place: Place) -> Iterator[Row]:
    """Perceptual hashes of each clip's first, middle and last frame."""
    for clip in known["clips"]:
        yield {"id": clip["id"], "hashes": [perceptual_hash(frame) for frame in three_frames(clip, place)]}


def perceptual_hash(frame_HWC: np.ndarray) -> int:
    """64 bits that two encodings of a picture share: which low frequencies exceed their median."""
    grey = cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:HASH_KEPT, :HASH_KEPT].ravel()
    bits = low > np.median(low)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def three_frames(clip: Row, place: Place) -> list[np.ndarray]:
    """First, middle and last frame of a clip: uint8 RGB, (H, W, 3)."""
    last = clip["end_frame"] - clip["start_frame"] - 1
    return read_pictures(place.out / clip["media"], [0, last // 2, last])


def read_pictures(path: Path, numbers: Sequence[int]) -> list[np.ndarray]:
    """Some frames of a clip, as the loader will see them: uint8 RGB, (H, W, 3). ValueError if it cannot."""
    return [to_rgb(frame).numpy() for frame in decode(path.read_bytes(), numbers)]
