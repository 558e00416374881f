"""Stage 1: probe a file and read its metadata, decoding at most one frame."""

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
from svd_ds.curate.sidecars import read_metadata
from svd_ds.curate.stages import StageContext
from svd_ds.curate.table import Row, RowsByStage
from svd_ds.data.decoding import select_video_stream
from svd_ds.data.timeline import typical_rate
from svd_ds.pixels.container import open_container
from svd_ds.pixels.frame import is_plain
from svd_ds.pixels.still import read_still

COLUMNS = {
    "kind": pa.string(),
    "codec": pa.string(),
    "pixel_format": pa.string(),
    "height": pa.int32(),
    "width": pa.int32(),
    "plain": pa.bool_(),
    "pixel_aspect": pa.string(),
    "rate": pa.string(),
    "constant_rate": pa.bool_(),
    "declared_frames": pa.int64(),
    "num_frames": pa.int64(),
    "keyframes": pa.list_(pa.int64()),
    "first_pts": pa.int64(),
    "metadata": pa.string(),
}
SEEKABLE_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
"""Containers in which a seek finds the exact keyframe; in a transport stream it may land after it."""
MAX_JITTER = 0.3
"""Maximum deviation of times from a constant rate, in frames; containers round times to milliseconds."""
MAX_REORDERING = 1
"""Maximum step back of packet times in decoding order, in seconds, that reordering explains."""
USUAL_RATES = (
    *(Fraction(24000, 1001), Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(30)),
    *(Fraction(50), Fraction(60000, 1001), Fraction(60), Fraction(10), Fraction(12), Fraction(15)),
)
"""Standard frame rates, to which measured rates are snapped."""
RATE_ROUNDING = 0.003
"""Maximum relative error of a rate that is measured from rounded times."""
MAX_RATE = 240
"""Upper limit of the rate of a variable-rate video: two frames close to each other do not make it slow
motion."""


@dataclass(frozen=True)
class PacketSummary:
    """Timing of a video from its packets, with times as frame numbers at a constant rate."""

    rate: Fraction
    constant_rate: bool
    """True if every frame has a time of the constant rate: frame numbers then count the stored frames."""
    num_frames: int
    keyframes: list[int]
    """Numbers of frames at which decoding can start and before which it can end: closed groups of pictures
    only."""
    first_pts: int
    """Presentation time of frame 0, in ticks of the stream."""


def probe(settings: None, file: RawFile, inputs: RowsByStage, context: StageContext) -> Iterator[Row]:
    """Yield one row for the file.

    Raises:
        ValueError: the file is unusable; the message has the reason.
    """
    if file.fault is not None:
        raise ValueError(file.fault)
    suffix = file.path.suffix.lower()
    if suffix not in VIDEOS + IMAGES:
        raise ValueError(f"it is neither a video nor an image by its suffix {suffix!r}")
    metadata = json.dumps(read_metadata(file.path, file.listed), ensure_ascii=False)
    yield {**(probe_video(file.path) if suffix in VIDEOS else probe_image(file.path)), "metadata": metadata}


def probe_image(path: Path) -> Row:
    """Return the probe columns of an image."""
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
    """Return the probe columns of a video.

    Raises:
        ValueError: it has no video stream, no frame rate, fewer than two frames, or an undecodable first
            frame.
    """
    try:
        with open_container(path) as container:
            stream = select_video_stream(container)
            packets = read_packets(container, stream)
            # Reopened instead of sought: in MPEG-TS a seek to the first time lands after the first keyframe.
            with open_container(path) as reopened:
                frame = next(reopened.decode(select_video_stream(reopened)), None)
            if frame is None:
                raise ValueError("none of its frames can be decoded")
            codec = stream.codec_context
            return {
                "kind": "video",
                "codec": codec.name,
                "pixel_format": codec.pix_fmt,
                "height": frame.height,
                "width": frame.width,
                "plain": is_plain(frame),
                "pixel_aspect": str(stream.sample_aspect_ratio or Fraction(1)),
                "rate": str(packets.rate),
                "constant_rate": packets.constant_rate,
                "declared_frames": count_declared_frames(container, stream),
                "num_frames": packets.num_frames,
                "keyframes": packets.keyframes if container.format.name in SEEKABLE_FORMATS else [],
                "first_pts": packets.first_pts,
            }
    except av.FFmpegError as error:
        raise ValueError(f"it cannot be decoded ({error.strerror})") from error


def read_packets(container: Any, stream: Any) -> PacketSummary:
    """Demux a video and summarise its timing.

    Raises:
        ValueError: it has no frame rate or fewer than two frames.
    """
    packets = [packet for packet in container.demux(stream) if packet.size]
    found = [(packet.pts, packet.is_keyframe) for packet in packets if not packet.is_discard]
    if len(found) < 2:
        raise ValueError(f"its number of frames is {len(found)}: a video needs at least 2")
    times = [pts for pts, _ in found if pts is not None]
    if len(times) < len(found):
        # AVI stores no times: its frame rate is constant by construction, but packets have no frame numbers.
        if not stream.average_rate:
            raise ValueError("it has no frame rate")
        return PacketSummary(stream.average_rate, True, len(found), [], 0)
    # Visible frames may depend on hidden ones, which a copy would lack; and when the clock restarts, times do
    # not give frame numbers.
    hidden = len(found) < len(packets) or _clock_restarts(times, stream.time_base)
    times = _unwrap_times(times, stream.time_base) if hidden else times
    first_pts = min(times)
    rate, constant_rate = find_rate(
        sorted(float((pts - first_pts) * stream.time_base) for pts in times), stream.average_rate
    )
    constant_rate = constant_rate and not hidden
    numbers = [round((pts - first_pts) * stream.time_base * rate) for pts in times]
    keyframes = closed_keyframes(numbers, [is_key for _, is_key in found]) if constant_rate else []
    return PacketSummary(rate, constant_rate, max(numbers) + 1, keyframes, first_pts)


def count_declared_frames(container: Any, stream: Any) -> int:
    """Return the number of visible frames according to the container, 0 if unknown.

    Edit lists hide some of the stored frames.
    """
    if "mp4" in container.format.name.split(","):
        return sum(not entry.is_discard for entry in stream.index_entries)
    return stream.frames


def _clock_restarts(times: Sequence[int], tick: Fraction) -> bool:
    """Return True if the times of packets, in decoding order, restart somewhere."""
    return any(
        latest - pts > MAX_REORDERING / tick
        for pts, latest in zip(times, accumulate(times, max), strict=True)
    )


def _unwrap_times(times: Sequence[int], tick: Fraction) -> list[int]:
    """Put the times of packets, in decoding order, on one clock: after each restart they continue."""
    unwrapped: list[int] = []
    offset, latest = 0, times[0]
    gaps = [after - before for before, after in pairwise(sorted(set(times)))] or [1]
    for pts in times:
        if latest - (pts + offset) > MAX_REORDERING / tick:
            offset = latest + round(statistics.median(gaps)) - pts
        unwrapped.append(pts + offset)
        latest = max(latest, unwrapped[-1])
    return unwrapped


def find_rate(times: Sequence[float], declared: Fraction | None) -> tuple[Fraction, bool]:
    """Find the frame rate of a video.

    It is the declared rate if all times fit it; else the standard rate closest to that of the usual gap; else
    the rate of the usual gap.

    Args:
        times: ascending times of the frames in seconds, the first being 0.
        declared: frame rate in the header of the file, if it has one.

    Returns:
        (frame rate in frames a second, True if all times fit it).

    Raises:
        ValueError: all times are the same.
    """
    gaps = [after - before for before, after in pairwise(times) if after > before]
    if not gaps:
        raise ValueError("all its frames have the same time")
    usual = Fraction(min(MAX_RATE, typical_rate(gaps))).limit_denominator(1001)
    rates = [rate for rate in USUAL_RATES if abs(rate / usual - 1) < RATE_ROUNDING]
    rates = [*sorted(rates, key=lambda rate: abs(rate - usual)), usual]
    for rate in [declared, *rates] if declared else rates:
        if all(abs(time * rate - number) < MAX_JITTER for number, time in enumerate(times)):
            return rate, True
    return rates[0], False


def closed_keyframes(numbers: Sequence[int], is_key: Sequence[bool]) -> list[int]:
    """Return the keyframes, among frames in decoding order, on which no frame of another group depends.

    Frames decoded after such a keyframe are all shown after it, and frames decoded before it are shown before
    it.
    """
    latest_before, closed = -1, []
    earliest_after = [math.inf] * (len(numbers) + 1)
    for i in range(len(numbers) - 1, -1, -1):
        earliest_after[i] = min(earliest_after[i + 1], numbers[i])
    for i, (number, key) in enumerate(zip(numbers, is_key, strict=True)):
        if key and latest_before < number and earliest_after[i] == number:
            closed.append(number)
        latest_before = max(latest_before, number)
    return closed
