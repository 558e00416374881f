"""Frames of a video or image file held in memory, by their numbers: the decoder of reader and indexer."""

from __future__ import annotations

import io
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import av
from av.stream import Disposition
from av.video.frame import VideoFrame
from PIL import Image

from svd_ds.data.sample import MAX_PIXELS
from svd_ds.data.timeline import Timeline, read_timeline
from svd_ds.pixels.frame import progressive
from svd_ds.pixels.still import is_still, read_still

PADDING = 2**20
"""Pixels that libav may add to a frame of its own: it counts whole blocks."""
MAX_COUNTED = 3000
"""Frames of a video whose packets have no times: to find one, all before it are decoded."""


def decode(content: bytes, wanted: Sequence[int], max_pixels: int = MAX_PIXELS) -> Iterator[VideoFrame]:
    """Decode some frames of a video or image file held in memory: see `pixels.frame.to_rgb` for their pixels.

    Args:
        content: the file's bytes.
        wanted: ascending frame numbers, as timeline.py counts them. Decoding goes from the keyframe before
            the first to the last.
        max_pixels: of a frame; a file that claims more is refused before anything is decoded.

    Raises:
        ValueError: the file cannot be decoded, has not all of these frames, or they are too large.
    """
    if is_still(content):
        yield from _decode_still(content, wanted, max_pixels)
        return
    found = 0
    try:
        with open_video(content, max_pixels) as (container, stream):
            # Number 0 of a file is its first frame, whatever its clock.
            timeline = read_timeline(container, stream) if wanted[-1] > 0 else None
            if timeline is not None:
                count = bisect_left(wanted, len(timeline.times))
                times = [timeline.times[number] for number in wanted[:count]]
                if times:
                    container.seek(timeline.seek_time(times[0]), stream=stream)
                for frame in _at(times, progressive(container.decode(stream)), timeline):
                    found += 1
                    yield frame
        if timeline is None or found < count:
            with open_video(content, max_pixels) as (container, stream):
                frames = progressive(container.decode(stream))
                # A seek may lead past a frame: then it is looked for from the start on.
                rest = _nth(wanted, frames) if timeline is None else _at(times[found:], frames, timeline)
                for frame in rest:
                    found += 1
                    yield frame
    except av.FFmpegError as error:
        raise ValueError(f"the file cannot be decoded ({error.strerror})") from error
    if timeline is not None and found < count:
        raise ValueError(f"its frame {wanted[found]} cannot be decoded")
    if found < len(wanted):
        raise ValueError(f"the file ends after {found} of {len(wanted)} frames, before number {wanted[-1]}")


@contextmanager
def open_video(content: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[Any, Any]]:
    """The container and the video stream of a file held in memory, which is decoded in one thread.

    Raises:
        ValueError: it has no video stream, or claims frames of more than `max_pixels`.
        av.FFmpegError: it cannot be opened.
    """
    # libav opens a file by decoding its first keyframe, a twelfth of a clip's time, to learn how far frames
    # stand from their decoding order. An mp4's header tells it, unless the file is in fragments.
    blindly = content[4:8] == b"ftyp" and b"moof" not in content
    options = {"skip_frame": "all"} if blindly else {}
    limit = {"max_pixels": str(max_pixels + PADDING)}
    with av.open(io.BytesIO(content), mode="r", options=options | limit) as container:
        stream = shown_stream(container)
        if stream.width * stream.height > max_pixels:
            raise ValueError(_too_large(stream.height, stream.width, max_pixels))
        stream.thread_count = 1
        stream.codec_context.options = limit
        yield container, stream


def shown_stream(container: Any) -> Any:
    """The video stream that a player shows: the default one, then the largest; no cover picture of a song.

    Raises:
        ValueError: there is none.
    """
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise ValueError("it has no video stream")
    return max(streams, key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height))


def _at(times: Sequence[int], frames: Iterable[VideoFrame], timeline: Timeline) -> Iterator[VideoFrame]:
    """The frames at ascending times, until one is missing."""
    found = 0
    if not times:
        return
    for frame in frames:
        time = timeline.time_of(frame)
        if time is None or time < times[found]:
            continue
        while time == times[found]:
            yield frame
            found += 1
            if found == len(times):
                return
        if time > times[found]:
            return


def _nth(wanted: Sequence[int], frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
    """The frames of these ascending numbers, counted from 0."""
    found = 0
    for number, frame in enumerate(frames):
        while number == wanted[found]:
            yield frame
            found += 1
            if found == len(wanted):
                return


def _check_still(content: bytes, max_pixels: int) -> None:
    """Raises ValueError for an image whose header claims more pixels: decoders would allocate them first."""
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            width, height = Image.open(io.BytesIO(content)).size
    except Image.DecompressionBombError as error:
        raise ValueError(f"the file is not decoded ({error})") from error
    except Exception:
        return  # The decoder says what is wrong with it.
    if width * height > max_pixels:
        raise ValueError(_too_large(height, width, max_pixels))


def _too_large(height: int, width: int, max_pixels: int) -> str:
    return (
        f"the file claims {height} x {width} pixels, and its frames may have {max_pixels}: it is not decoded"
    )


def _decode_still(content: bytes, wanted: Sequence[int], max_pixels: int) -> Iterator[VideoFrame]:
    _check_still(content, max_pixels)
    try:
        frame = VideoFrame.from_ndarray(read_still(content), format="rgb24")
    except ValueError as error:
        raise ValueError(f"the file cannot be decoded: {error}") from error
    for found, number in enumerate(wanted):
        if number > 0:
            raise ValueError(
                f"the file ends after {found} of {len(wanted)} frames, before number {wanted[-1]}"
            )
        yield frame
