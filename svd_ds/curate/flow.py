"""Optical flow motion score of arXiv 2311.15127, section 3.1 and appendix C."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import cv2
import numpy as np

FLOW_FPS = 2.0
"""Frame rate at which flow is computed."""
FLOW_SIDE = 64
"""Shortest side on which flow is computed, in pixels. OpenCV's pyramid ends at 32 pixels, so that small
frames allow larger displacements."""
MAP_SIDE = 16
"""Shortest side to which flow maps are averaged before their magnitude is taken: noise of flat areas
cancels."""


def motion_score(frames: Sequence[np.ndarray], fps: float) -> float:
    """Compute the mean speed over time and space, in shortest sides of the frame a second.

    Dense Farneback flow between frames half a second apart, or between the first and last of a shorter clip.
    The unit depends on neither resolution nor frame rate. A pan is measured to a few per cent up to 0.35
    shortest sides a frame pair, and underestimated beyond.

    Args:
        frames: uint8 RGB, (H, W, 3) each; a single frame has the score 0.
        fps: frames a second of `frames`.
    """
    return video_motion_score(lambda numbers: (frames[number] for number in numbers), len(frames), fps)


def video_motion_score(read: Callable[[range], Iterable[np.ndarray]], num_frames: int, fps: float) -> float:
    """Compute the `motion_score` of a video, keeping only small grey copies of its frames in memory.

    Args:
        read: reads frames by number, each uint8 RGB, (H, W, 3).
        num_frames: number of frames of the video.
        fps: its frames a second.
    """
    if num_frames < 2:
        return 0.0
    step = min(max(1, round(fps / FLOW_FPS)), num_frames - 1)
    grey = [_grey(frame) for frame in read(range(0, num_frames, step))]
    speeds = [_mean_flow(first, second) for first, second in pairwise(grey)]
    return float(np.mean(speeds)) / FLOW_SIDE * fps / step


def _grey(frame_HWC: np.ndarray) -> np.ndarray:
    return cv2.resize(
        cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2GRAY), _size(frame_HWC, FLOW_SIDE), interpolation=cv2.INTER_AREA
    )


def _mean_flow(first_HW: np.ndarray, second_HW: np.ndarray) -> float:
    """Compute the mean displacement in pixels between two grey frames."""
    start = np.zeros((*first_HW.shape, 2), dtype=np.float32)
    flow_HW2 = cv2.calcOpticalFlowFarneback(
        first_HW,
        second_HW,
        start,
        pyr_scale=0.5,
        levels=5,
        winsize=21,
        iterations=5,
        poly_n=7,
        poly_sigma=1.5,
        flags=0,
    )
    averaged = cv2.resize(flow_HW2, _size(flow_HW2, MAP_SIDE), interpolation=cv2.INTER_AREA)
    return float(np.linalg.norm(averaged, axis=-1).mean())


def _size(image: np.ndarray, shortest: int) -> tuple[int, int]:
    """Return (width, height), as cv2 expects it, with the given shortest side."""
    height, width = image.shape[:2]
    scale = shortest / min(height, width)
    return round(width * scale), round(height * scale)
