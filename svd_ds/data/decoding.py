"""Decoding of frames by number from a video or image file held in memory; used by reader and indexer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import av
from av.stream import Disposition
from av.video.frame import VideoFrame

from svd_ds.data.timeline import Timeline, read_timeline
from svd_ds.pixels.container import open_container
from svd_ds.pixels.frame import deinterlace
from svd_ds.pixels.still import MAX_PIXELS, TooLargeError, is_still, read_still, too_large

MAX_UNTIMED_FRAMES = 3000
"""Largest number of frames of a video whose packets have no times: all frames before a wanted one are
decoded."""


def decode(content: bytes, wanted: Sequence[int], max_pixels: int = MAX_PIXELS) -> Iterator[VideoFrame]:
    """Decode some frames of a video or image file; `pixels.frame.to_rgb` gives their pixels.

    Args:
        content: bytes of the file.
        wanted: ascending frame numbers, as timeline.py counts them. Decoding begins at the keyframe before
            the first and ends at the last.
        max_pixels: largest allowed number of pixels of a frame; a file that claims more is not decoded.

    Raises:
        ValueError: the file cannot be decoded, lacks some of these frames, or they are too large.
    """
    if is_still(content):
        yield from _decode_still(content, wanted, max_pixels)
        return
    found = 0
    try:
        with open_video(content, max_pixels) as (container, stream):
            # Frame 0 is the first frame, whatever its time: no timeline is needed.
            timeline = read_timeline(container, stream) if wanted[-1] > 0 else None
            if timeline is not None:
                count = bisect_left(wanted, len(timeline.times))
                times = [timeline.times[number] for number in wanted[:count]]
                if times:
                    container.seek(timeline.seek_time(times[0]), stream=stream)
                for frame in _frames_at_times(times, deinterlace(container.decode(stream)), timeline):
                    found += 1
                    yield frame
        if timeline is None or found < count:
            with open_video(content, max_pixels) as (container, stream):
                frames = deinterlace(container.decode(stream))
                # A seek may lead past a frame: then the file is decoded from its start.
                remaining = (
                    _frames_at_numbers(wanted, frames)
                    if timeline is None
                    else _frames_at_times(times[found:], frames, timeline)
                )
                for frame in remaining:
                    found += 1
                    yield frame
    except av.FFmpegError as error:
        raise ValueError(f"the file cannot be decoded ({error.strerror})") from error
    if timeline is not None and found < count:
        raise ValueError(f"its frame {wanted[found]} cannot be decoded")
    if found < len(wanted):
        raise ValueError(f"the file ends after {found} of {len(wanted)} frames, before frame {wanted[-1]}")


@contextmanager
def open_video(content: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[Any, Any]]:
    """Open a video file held in memory, to be decoded in one thread; yields (container, video stream).

    Raises:
        ValueError: the file has no video stream, or claims frames of more than `max_pixels` pixels.
        av.FFmpegError: the file cannot be opened.
    """
    # On opening, libav decodes the first keyframe (a twelfth of the time of a clip) to find the reordering
    # delay of the frames. The header of an mp4 has it, unless the file is fragmented.
    has_delay = content[4:8] == b"ftyp" and b"moof" not in content
    options = {"skip_frame": "all"} if has_delay else {}
    with open_container(content, max_pixels, options) as container:
        stream = select_video_stream(container, max_pixels)
        stream.thread_count = 1
        yield container, stream


def select_video_stream(container: Any, max_pixels: int = MAX_PIXELS) -> Any:
    """Select the video stream that a player shows: the default one, else the largest; never cover art.

    Raises:
        ValueError: there is no video stream, or its frames have more than `max_pixels` pixels.
    """
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise ValueError("it has no video stream")
    shown = max(streams, key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height))
    if shown.width * shown.height > max_pixels:
        raise too_large(shown.height, shown.width, max_pixels)
    return shown


def _frames_at_times(
    times: Sequence[int], frames: Iterable[VideoFrame], timeline: Timeline
) -> Iterator[VideoFrame]:
    """Yield the frames at ascending times, until one is missing."""
    found = 0
    if not times:
        return
    for frame in frames:
        time = timeline.frame_time(frame)
        if time is None or time < times[found]:
            continue
        while time == times[found]:
            yield frame
            found += 1
            if found == len(times):
                return
        if time > times[found]:
            return


def _frames_at_numbers(wanted: Sequence[int], frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
    """Yield the frames with these ascending numbers, counted from 0."""
    found = 0
    for number, frame in enumerate(frames):
        while number == wanted[found]:
            yield frame
            found += 1
            if found == len(wanted):
                return


def _decode_still(content: bytes, wanted: Sequence[int], max_pixels: int) -> Iterator[VideoFrame]:
    """Decode an image file as a video of one frame; see `decode` for its errors."""
    try:
        frame = VideoFrame.from_ndarray(read_still(content, max_pixels), format="rgb24")
    except TooLargeError:
        raise
    except ValueError as error:
        raise ValueError(f"the file cannot be decoded: {error}") from error
    for found, number in enumerate(wanted):
        if number > 0:
            raise ValueError(
                f"the file ends after {found} of {len(wanted)} frames, before frame {wanted[-1]}"
            )
        yield frame
