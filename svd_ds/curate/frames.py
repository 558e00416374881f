"""A raw video's frames on an even clock, stood upright, with square pixels.

Frame k of a video is what it shows k / rate seconds after its first frame. In a video of constant rate that
is its k-th frame; one of variable rate is thinned and filled up to the even clock, so that everything after
this module may count frames. All frame numbers in the tables are such numbers.
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
"""Seconds that one frame may be shown: after a longer gap a video's clock is broken."""
RESTART = Fraction(1, 2)
"""Seconds by which a clock that begins anew goes back, at least; less is jitter."""


def read_frames(path: Path, rate: Fraction, promised: int = 0) -> Iterator[tuple[int, VideoFrame]]:
    """Number and frame, numbers going up by one from 0.

    Args:
        rate: of the even clock, frames a second.
        promised: frames that the file says it shows; 0 where it does not say.

    Raises:
        ValueError: a frame cannot be decoded, has another size than the ones before it, or comes after a
            gap; or there are fewer frames than promised.
    """
    number, held = -1, None
    size: tuple[int, int] | None = None
    try:
        with open_container(path) as container:
            stream = select_video_stream(container)
            stream.thread_type = "AUTO"
            clock = Clock(rate, counts=container.format.name == "avi")
            decoded = 0
            for frame in deinterlace(container.decode(stream)):
                if frame.is_corrupt:
                    raise ValueError(f"it is damaged from frame {number + 1} on")
                size = size or (frame.height, frame.width)
                if size != (frame.height, frame.width):
                    raise ValueError(
                        f"its frames change from {size[1]}x{size[0]} to {frame.width}x{frame.height} pixels "
                        f"at frame {number + 1}: what follows is left out"
                    )
                decoded += 1
                shown = clock.number(frame, number)
                if shown - number > max(1, MAX_GAP * rate):
                    raise ValueError(
                        f"its clock jumps by {float((shown - number) / rate):.0f} s after frame {number}"
                    )
                while held is not None and number < shown - 1:
                    number += 1
                    yield number, held
                held = frame
                if shown > number:
                    number = shown
                    yield number, frame
    except av.FFmpegError as error:
        raise ValueError(f"it cannot be decoded from frame {number + 1} on ({error.strerror})") from error
    if decoded < promised:
        raise ValueError(f"it ends after {decoded} of the {promised} frames that it says it has")


class Clock:
    """From a frame's time to its number on an even clock that starts at 0 and never goes back."""

    def __init__(self, rate: Fraction, counts: bool) -> None:
        """counts: the container stores no times (AVI): its frames are even by construction, and the times
        that a decoder makes up are wrong where frames are reordered."""
        self._rate = rate
        self._counts = counts
        self._first: Fraction | None = None
        self._last: Fraction | None = None

    def number(self, frame: VideoFrame, before: int) -> int:
        """The number of a frame, in the order in which they are shown; `before` is that of the one before."""
        if self._counts or frame.pts is None or frame.time_base is None:
            return before + 1
        time = frame.pts * frame.time_base
        if self._first is None:
            self._first = time
        elif self._last is not None and self._last - time > RESTART:
            # Joined recordings: the second one's clock begins anew.
            self._first = time - (before + 1) / self._rate
        self._last = time
        return round((time - self._first) * self._rate)


def upright(frame: VideoFrame, pixel_aspect: Fraction, size: int) -> np.ndarray:
    """A decoded frame as it is shown, with square pixels."""
    if swaps_height_and_width(frame):
        pixel_aspect = 1 / pixel_aspect
    return resized(to_rgb(frame), pixel_aspect, size)


def resized(frame_HWC: torch.Tensor, pixel_aspect: Fraction, size: int) -> np.ndarray:
    """(H, W, 3) with square pixels, its shortest side reduced to `size`, both sides even."""
    height, width = frame_HWC.shape[:2]
    shown = (float(height), float(width * pixel_aspect))
    scale = min(1.0, size / min(shown)) if size else 1.0
    new_height, new_width = (max(2, 2 * round(side * scale / 2)) for side in shown)
    return resize_crop(frame_HWC, Box(0, 0, height, width), new_height, new_width).contiguous().numpy()
