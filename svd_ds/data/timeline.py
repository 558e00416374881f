"""Which frames a video file shows, and when: read from its packets, without decoding them.

The indexer and the reader number frames by this one rule. Where the frames lie on an even clock, give or
take MAX_JITTER, frame k is the k-th that is shown: rounded times, a hole and a last frame that is held change
no number. In a video of a truly variable rate, frame k is what is shown k / rate seconds after the first.
Headers are not asked: frames that an edit list hides count for a header, and its average rate includes how
long the last frame is held.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

MAX_JITTER = 1.5
"""Frames by which a frame may miss its place on an even clock."""
NEAR = 0.1
"""Share of the median gap by which a usual gap may differ from it."""
MAX_RATE = 240.0
"""Frames a second of a variable rate: two frames that lie close do not make it a slow-motion camera's."""
MAX_GAP = 60.0
"""Seconds that one frame may be shown: after a longer gap a video's clock is broken."""
VP8_SHOWN = 0x10
"""Bit of a VP8 packet's first byte: it is a frame to be shown, and not one for reference only."""


@dataclass(frozen=True)
class Timeline:
    """The frames of a video that are shown."""

    times: Sequence[int]
    """Number of a frame -> its time, in the stream's ticks; the same time several times where it is held."""
    rate: float
    """Frames a second of these numbers."""
    keyframes: Sequence[tuple[int, int]]
    """(time shown, time to seek to) of each frame at which decoding can start, both in ticks, ascending."""

    by_dts: bool = False
    """The times are those at which frames are decoded: no others are known, and they come in that order."""

    def time_of(self, frame: Any) -> int | None:
        """When a decoded frame is shown; None where it does not say."""
        time: int | None = frame.dts if self.by_dts else frame.pts
        return time

    def seek_time(self, time: int) -> int:
        """Where to seek to, to decode the frame shown at `time`."""
        return max((key for key in self.keyframes if key[0] <= time), default=(0, self.keyframes[0][1]))[1]


def read_timeline(container: Any, stream: Any) -> Timeline | None:
    """The timeline of an open video, whose packets are read to their end.

    None where packets do not say when their frames are shown, as in AVI with B-frames: frames are counted as
    they are decoded.

    Raises:
        ValueError: the video's clock is broken.
    """
    is_avi = container.format.name == "avi"
    if is_avi and stream.codec_context.has_b_frames:
        return None
    is_vp8 = stream.codec_context.name.startswith("vp8")
    by_pts = "matroska" in container.format.name
    shown: list[int] = []
    keyframes: list[tuple[int, int]] = []
    for packet in container.demux(stream):
        if not packet.size or (is_vp8 and not memoryview(packet)[0] & VP8_SHOWN):
            continue
        # In an AVI without B-frames a packet's place in the file is its time.
        time = packet.dts if is_avi else packet.pts
        if time is None:
            return None
        if packet.is_keyframe:
            keyframes.append((time, time if by_pts or packet.dts is None else min(time, packet.dts)))
        # Frames before the first keyframe cannot be decoded; those that an edit list hides are not shown.
        if keyframes and time >= keyframes[0][0] and not packet.is_discard:
            shown.append(time)
    if not shown or len(set(shown)) < len(shown):
        return None
    shown.sort()
    rate, is_even = fit_clock(
        [float((time - shown[0]) * stream.time_base) for time in shown],
        [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate],
    )
    times = shown if is_even else _on_clock(shown, rate * float(stream.time_base))
    return Timeline(times, rate, sorted(keyframes), by_dts=is_avi)


def fit_clock(seconds: Sequence[float], told: Sequence[float]) -> tuple[float, bool]:
    """The rate of ascending times from 0, and whether all of them keep to it.

    Args:
        told: rates that the file tells, the preferred one first.

    Raises:
        ValueError: two times lie further apart than MAX_GAP.
    """
    if len(seconds) < 2:
        return (told[0] if told else 1.0), True
    gaps = [after - before for before, after in pairwise(seconds)]
    if max(gaps) > MAX_GAP:
        raise ValueError(f"its clock jumps by {max(gaps):.0f} s after frame {gaps.index(max(gaps))}")
    rates = [*told, (len(seconds) - 1) / seconds[-1]]
    times = np.array(seconds)
    for jitter in (MAX_JITTER / 3, MAX_JITTER):
        for rate in rates:
            if np.abs(times * rate - np.arange(len(times))).max() <= jitter:
                return rate, True
    usual = min(MAX_RATE, typical_rate(gaps))
    return next((rate for rate in told if math.isclose(rate, usual, rel_tol=0.02)), usual), False


def typical_rate(gaps: Sequence[float]) -> float:
    """Frames a second of the usual gap between frames, in seconds: the mean of the gaps near the median.

    The median alone is a gap as the container rounds it: 42 ms in Matroska, for 24 frames a second.
    """
    median = statistics.median(gaps)
    near = [gap for gap in gaps if abs(gap - median) <= NEAR * median]
    return len(near) / sum(near)


def _on_clock(shown: Sequence[int], rate: float) -> list[int]:
    """The time of the frame that is shown at each number of an even clock, `rate` numbers a tick."""
    numbers = np.round((np.array(shown) - shown[0]) * rate).astype(np.int64)
    latest = np.searchsorted(numbers, np.arange(numbers[-1] + 1), side="right") - 1
    return [shown[place] for place in latest]
