"""Frames of a raw video at a constant frame rate, upright and with square pixels.

Frame k of a video is the picture it shows k / rate seconds after its first frame. In a video of constant rate
this is its k-th frame; a video of variable rate is resampled to a constant one, so that all modules after
this one can count frames. All frame numbers in the tables are defined this way.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.frame import VideoFrame

from svd_ds.data.clips import Box, resize_crop
from svd_ds.data.decoding import select_video_stream
from svd_ds.pixels.container import open_container
from svd_ds.pixels.frame import deinterlace, swaps_height_and_width, to_rgb

MAX_GAP = 10.0
"""Maximum duration of one frame in seconds; a longer gap means that the video's times are damaged."""
MIN_RESTART = Fraction(1, 2)
"""Minimum step back of frame times, in seconds, that counts as a restart of the clock; less is jitter."""


def read_frames(path: Path, rate: Fraction, declared_frames: int = 0) -> Iterator[tuple[int, VideoFrame]]:
    """Yield (number, frame), with consecutive numbers from 0.

    Args:
        path: the video.
        rate: constant frame rate of the numbers, in frames a second.
        declared_frames: number of frames according to the container; 0 if unknown.

    Raises:
        ValueError: a frame cannot be decoded, has another size than the ones before it, or comes after a gap;
            or there are fewer frames than declared.
    """
    number, current = -1, None
    size: tuple[int, int] | None = None
    try:
        with open_container(path) as container:
            stream = select_video_stream(container)
            stream.thread_type = "AUTO"
            clock = FrameClock(rate, ignore_times=container.format.name == "avi")
            decoded = 0
            for frame in deinterlace(container.decode(stream)):
                if frame.is_corrupt:
                    raise ValueError(f"it is damaged from frame {number + 1} on")
                size = size or (frame.height, frame.width)
                if size != (frame.height, frame.width):
                    raise ValueError(
                        f"its frames change from {size[1]}x{size[0]} to {frame.width}x{frame.height} pixels "
                        f"at frame {number + 1}: the rest is left out"
                    )
                decoded += 1
                shown = clock.number(frame, number)
                if shown - number > max(1, MAX_GAP * rate):
                    raise ValueError(
                        f"its clock jumps by {float((shown - number) / rate):.0f} s after frame {number}"
                    )
                while current is not None and number < shown - 1:
                    number += 1
                    yield number, current
                current = frame
                if shown > number:
                    number = shown
                    yield number, frame
    except av.FFmpegError as error:
        raise ValueError(f"it cannot be decoded from frame {number + 1} on ({error.strerror})") from error
    if decoded < declared_frames:
        raise ValueError(f"it ends after {decoded} of the {declared_frames} frames that its header declares")


class FrameClock:
    """Converts frame times to increasing frame numbers at a constant rate."""

    def __init__(self, rate: Fraction, ignore_times: bool) -> None:
        """Create a clock.

        Args:
            rate: frames a second.
            ignore_times: count frames instead, for containers that store no times (AVI): the times that a
                decoder makes up are wrong if frames are reordered.
        """
        self._rate = rate
        self._ignore_times = ignore_times
        self._first: Fraction | None = None
        self._last: Fraction | None = None

    def number(self, frame: VideoFrame, previous: int) -> int:
        """Return the number of a frame, in display order; `previous` is the number of the frame before it."""
        if self._ignore_times or frame.pts is None or frame.time_base is None:
            return previous + 1
        time = frame.pts * frame.time_base
        if self._first is None:
            self._first = time
        elif self._last is not None and self._last - time > MIN_RESTART:
            # Joined recordings: the clock of the second one restarts.
            self._first = time - (previous + 1) / self._rate
        self._last = time
        return round((time - self._first) * self._rate)


def to_upright(frame: VideoFrame, pixel_aspect: Fraction, size: int) -> np.ndarray:
    """Convert a decoded frame to uint8 RGB as it is displayed, with square pixels."""
    if swaps_height_and_width(frame):
        pixel_aspect = 1 / pixel_aspect
    return resize(to_rgb(frame), pixel_aspect, size)


def resize(frame: torch.Tensor, pixel_aspect: Fraction, size: int) -> np.ndarray:
    """Resize to square pixels and even sides, with the shortest side reduced to `size`: (H, W, 3)."""
    height, width = frame.shape[:2]
    shown = (float(height), float(width * pixel_aspect))
    scale = min(1.0, size / min(shown)) if size else 1.0
    new_height, new_width = (max(2, 2 * round(side * scale / 2)) for side in shown)
    return resize_crop(frame, Box(0, 0, height, width), new_height, new_width).contiguous().numpy()
