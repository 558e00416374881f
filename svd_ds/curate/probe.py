"""First stage: is it a video, and what does its file say of it without decoding more than one frame?"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import av
import pyarrow as pa

from svd_ds.curate.raw import IMAGES, VIDEOS, RawFile
from svd_ds.curate.sidecars import told_of
from svd_ds.curate.stages import Place
from svd_ds.curate.table import Known, Row
from svd_ds.data.decoding import select_video_stream
from svd_ds.data.timeline import typical_rate
from svd_ds.pixels.container import open_container
from svd_ds.pixels.frame import is_plain
from svd_ds.pixels.still import read_still

COLUMNS = {
    "kind": pa.string(),
    "codec": pa.string(),
    "pixels": pa.string(),
    "height": pa.int32(),
    "width": pa.int32(),
    "plain": pa.bool_(),
    "pixel_aspect": pa.string(),
    "rate": pa.string(),
    "even": pa.bool_(),
    "promised": pa.int64(),
    "num_frames": pa.int64(),
    "keyframes": pa.list_(pa.int64()),
    "first": pa.int64(),
    "told": pa.string(),
}
INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
"""Containers in which a seek finds the very keyframe: in a transport stream it may land behind it."""
EVEN = 0.3
"""Share of a frame by which times may miss an even clock: containers round them to milliseconds."""
REORDERED = 1
"""Seconds by which the times of packets may go back for the order in which they are decoded."""
USUAL_RATES = (
    *(Fraction(24000, 1001), Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30)),
    *(Fraction(50), Fraction(60000, 1001), Fraction(60), Fraction(10), Fraction(12), Fraction(15)),
)
ROUNDING = 0.003
"""Share by which rounded times may move the rate of the usual gap from the true one."""
MAX_RATE = 240
"""Of a video whose clock is uneven: two frames that lie close do not make it a slow-motion camera's."""


@dataclass(frozen=True)
class Packets:
    """What demuxing tells of a video, its times as frame numbers on an even clock."""

    rate: Fraction
    even: bool
    """Every frame lies on the clock: frame numbers count the stored frames."""
    num_frames: int
    keyframes: list[int]
    """Frames at which decoding can start and before which it can end: closed groups of pictures only."""
    first: int
    """When frame 0 is shown, in the stream's ticks."""


def probe(settings: None, file: RawFile, known: Known, place: Place) -> Iterator[Row]:
    """A row for the file. Raises ValueError with the reason where it is of no use."""
    if file.fault is not None:
        raise ValueError(file.fault)
    suffix = file.path.suffix.lower()
    if suffix not in VIDEOS + IMAGES:
        raise ValueError(f"it is neither a video nor an image by its suffix {suffix!r}")
    told = json.dumps(told_of(file.path, file.listed), ensure_ascii=False)
    yield {**(probe_video(file.path) if suffix in VIDEOS else probe_image(file.path)), "told": told}


def probe_image(path: Path) -> Row:
    height, width = read_still(path).shape[:2]
    return {
        "kind": "image",
        "height": height,
        "width": width,
        "rate": "1",
        "pixel_aspect": "1",
        "plain": True,
        "num_frames": 1,
    }


def probe_video(path: Path) -> Row:
    """Raises ValueError where it has no video, no frame rate, one frame, or a first frame that is no use."""
    try:
        with open_container(path) as container:
            stream = select_video_stream(container)
            packets = read_packets(container, stream)
            # Opened anew and not sought: in MPEG-TS a seek to the first time lands after the first keyframe.
            with open_container(path) as again:
                frame = next(again.decode(select_video_stream(again)), None)
            if frame is None:
                raise ValueError("none of its frames can be decoded")
            context = stream.codec_context
            return {
                "kind": "video",
                "codec": context.name,
                "pixels": context.pix_fmt,
                "height": frame.height,
                "width": frame.width,
                "plain": is_plain(frame),
                "pixel_aspect": str(stream.sample_aspect_ratio or Fraction(1)),
                "rate": str(packets.rate),
                "even": packets.even,
                "promised": promised(container, stream),
                "num_frames": packets.num_frames,
                "keyframes": packets.keyframes if container.format.name in INDEXED else [],
                "first": packets.first,
            }
    except av.FFmpegError as error:
        raise ValueError(f"it cannot be decoded ({error.strerror})") from error


def read_packets(container: Any, stream: Any) -> Packets:
    """Raises ValueError for a video without a frame rate or with fewer than two frames."""
    packets = [packet for packet in container.demux(stream) if packet.size]
    found = [(packet.pts, packet.is_keyframe) for packet in packets if not packet.is_discard]
    if len(found) < 2:
        raise ValueError(f"it has {len(found)} frame, and a video needs 2")
    known = [pts for pts, _ in found if pts is not None]
    if len(known) < len(found):
        # AVI tells no times: its frames are even by construction, but which is which is not known here.
        if not stream.average_rate:
            raise ValueError("it has no frame rate")
        return Packets(stream.average_rate, True, len(found), [], 0)
    # Frames that are shown may be coded with the help of hidden ones, which a copy would lack; and where the
    # clock begins anew, its times number no frames.
    hidden = len(found) < len(packets) or _restarts(known, stream.time_base)
    known = _onwards(known, stream.time_base) if hidden else known
    first = min(known)
    rate, even = clock_of(
        sorted(float((pts - first) * stream.time_base) for pts in known), stream.average_rate
    )
    even = even and not hidden
    numbers = [round((pts - first) * stream.time_base * rate) for pts in known]
    keyframes = closed_keyframes(numbers, [is_key for _, is_key in found]) if even else []
    return Packets(rate, even, max(numbers) + 1, keyframes, first)


def promised(container: Any, stream: Any) -> int:
    """Frames that a file says it shows, 0 where it does not say; edit lists hide some that it holds."""
    if "mp4" in container.format.name.split(","):
        return sum(not entry.is_discard for entry in stream.index_entries)
    return stream.frames


def _restarts(times: Sequence[int], tick: Fraction) -> bool:
    """Whether the clock of packets, in decoding order, begins anew somewhere."""
    return any(
        latest - pts > REORDERED / tick for pts, latest in zip(times, accumulate(times, max), strict=True)
    )


def _onwards(times: Sequence[int], tick: Fraction) -> list[int]:
    """Times of packets, in decoding order, on one clock: after each new beginning the times go on."""
    onwards: list[int] = []
    offset, latest = 0, times[0]
    gaps = [after - before for before, after in pairwise(sorted(set(times)))] or [1]
    for pts in times:
        if latest - (pts + offset) > REORDERED / tick:
            offset = latest + round(statistics.median(gaps)) - pts
        onwards.append(pts + offset)
        latest = max(latest, onwards[-1])
    return onwards


def clock_of(times: Sequence[float], told: Fraction | None) -> tuple[Fraction, bool]:
    """The even clock of ascending times in seconds, from 0, and whether all of them lie on it.

    That is the rate which the file tells, where its frames keep to it; else the usual one near that of the
    usual gap; else that of the gap.
    """
    gaps = [after - before for before, after in pairwise(times) if after > before]
    if not gaps:
        raise ValueError("all its frames have one time")
    usual = Fraction(min(MAX_RATE, typical_rate(gaps))).limit_denominator(1001)
    rates = [rate for rate in USUAL_RATES if abs(rate / usual - 1) < ROUNDING]
    rates = [*sorted(rates, key=lambda rate: abs(rate - usual)), usual]
    for rate in [told, *rates] if told else rates:
        if all(abs(time * rate - number) < EVEN for number, time in enumerate(times)):
            return rate, True
    return rates[0], False


def closed_keyframes(numbers: Sequence[int], is_key: Sequence[bool]) -> list[int]:
    """Keyframes, among frames in decoding order, that no frame of another group leans on.

    Frames decoded after such a keyframe are all shown after it, frames decoded before it before.
    """
    latest_before, closed = -1, []
    earliest_after = [math.inf] * (len(numbers) + 1)
    for place in range(len(numbers) - 1, -1, -1):
        earliest_after[place] = min(earliest_after[place + 1], numbers[place])
    for place, (number, key) in enumerate(zip(numbers, is_key, strict=True)):
        if key and latest_before < number and earliest_after[place] == number:
            closed.append(number)
        latest_before = max(latest_before, number)
    return closed
