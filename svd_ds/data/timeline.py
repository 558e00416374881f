"""Timeline of a video file: its shown frames and their times, read from its packets without decoding.

The indexer and the reader number frames by the same rule. If the frame rate is constant, up to MAX_JITTER,
frame k is the k-th shown frame: rounded times, a gap and a last frame that is held do not change the numbers.
If the frame rate varies, frame k is the frame shown k / rate seconds after the first. The header is not used
for this: it counts frames that an edit list hides, and its average rate includes the time for which the last
frame is held.
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
"""Largest deviation of a frame's time from a constant frame rate, in frames."""
NEAR = 0.1
"""Largest relative difference of a gap between frames from the median gap for it to count as typical."""
MAX_RATE = 240.0
"""Largest frame rate of a video of variable rate, in frames a second: two close frames do not make it
higher."""
MAX_GAP = 60.0
"""Longest time in seconds for which a frame may be shown: a longer gap means that the times are broken."""
VP8_SHOWN = 0x10
"""Bit of the first byte of a VP8 packet that is set if its frame is shown, not only referenced (RFC 6386,
section 9.1)."""


@dataclass(frozen=True)
class Timeline:
    """Shown frames of a video."""

    times: Sequence[int]
    """Time of each frame number, in ticks of the stream; a held frame repeats its time."""
    rate: float
    """Frame rate of the numbered frames, in frames a second."""
    keyframes: Sequence[tuple[int, int]]
    """(time shown, time to seek to) of each keyframe, in ticks, ascending."""

    by_dts: bool = False
    """True if the times are decoding times, because presentation times are unknown and frames are in
    order."""

    def frame_time(self, frame: Any) -> int | None:
        """Return the time of a decoded frame in ticks; None if the frame has no time."""
        time: int | None = frame.dts if self.by_dts else frame.pts
        return time

    def seek_time(self, time: int) -> int:
        """Return the time to seek to in order to decode the frame shown at `time`, both in ticks."""
        return max((key for key in self.keyframes if key[0] <= time), default=(0, self.keyframes[0][1]))[1]


def read_timeline(container: Any, stream: Any) -> Timeline | None:
    """Read the timeline of an open video from its packets.

    Returns:
        The timeline; None if packets have no presentation times (AVI with B-frames): then frames are counted
        as they are decoded.

    Raises:
        ValueError: the times are broken.
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
        # In an AVI without B-frames the order of the packets gives their times.
        time = packet.dts if is_avi else packet.pts
        if time is None:
            return None
        if packet.is_keyframe:
            keyframes.append((time, time if by_pts or packet.dts is None else min(time, packet.dts)))
        # Frames before the first keyframe cannot be decoded; an edit list hides those marked for discard.
        if keyframes and time >= keyframes[0][0] and not packet.is_discard:
            shown.append(time)
    if not shown or len(set(shown)) < len(shown):
        return None
    shown.sort()
    rate, is_constant = fit_clock(
        [float((time - shown[0]) * stream.time_base) for time in shown],
        [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate],
    )
    times = shown if is_constant else _resample_times(shown, rate * float(stream.time_base))
    return Timeline(times, rate, sorted(keyframes), by_dts=is_avi)


def fit_clock(seconds: Sequence[float], header_rates: Sequence[float]) -> tuple[float, bool]:
    """Fit a constant frame rate to the times of frames.

    Args:
        seconds: ascending times in seconds, the first being 0.
        header_rates: frame rates in the header of the file, the preferred one first.

    Returns:
        (frame rate in frames a second, True if all times agree with it up to MAX_JITTER).

    Raises:
        ValueError: two consecutive times differ by more than MAX_GAP.
    """
    if len(seconds) < 2:
        return (header_rates[0] if header_rates else 1.0), True
    gaps = [after - before for before, after in pairwise(seconds)]
    if max(gaps) > MAX_GAP:
        raise ValueError(f"its clock jumps by {max(gaps):.0f} s after frame {gaps.index(max(gaps))}")
    rates = [*header_rates, (len(seconds) - 1) / seconds[-1]]
    times = np.array(seconds)
    for jitter in (MAX_JITTER / 3, MAX_JITTER):
        for rate in rates:
            if np.abs(times * rate - np.arange(len(times))).max() <= jitter:
                return rate, True
    typical = min(MAX_RATE, typical_rate(gaps))
    return next((rate for rate in header_rates if math.isclose(rate, typical, rel_tol=0.02)), typical), False


def typical_rate(gaps: Sequence[float]) -> float:
    """Return the frame rate, in frames a second, of the mean of the gaps near the median gap.

    The median alone is rounded by the container: to 42 ms in Matroska, at 24 frames a second.

    Args:
        gaps: times between consecutive frames in seconds.
    """
    median = statistics.median(gaps)
    near = [gap for gap in gaps if abs(gap - median) <= NEAR * median]
    return len(near) / sum(near)


def _resample_times(shown: Sequence[int], rate: float) -> list[int]:
    """Return the time, in ticks, of the frame shown at each number of a constant rate of `rate` numbers a
    tick."""
    numbers = np.round((np.array(shown) - shown[0]) * rate).astype(np.int64)
    latest = np.searchsorted(numbers, np.arange(numbers[-1] + 1), side="right") - 1
    return [shown[index] for index in latest]
