"""Safe opening of video files: the only place that opens media of unknown origin with PyAV.

libav also reads files that name other files to open: playlists (HLS, DASH, concat), session descriptions
(SDP), patterns of names. Only containers that hold their own streams are opened here, and no other file is
read.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import av
from av.container import InputContainer

from svd_ds.pixels.still import MAX_PIXELS
from svd_ds.small_files import check_regular

FORMATS = (
    "mov", "matroska", "avi", "mpeg", "mpegts", "mpegvideo", "m4v", "h264", "hevc", "av1", "obu", "ivf",
    "flv", "asf", "ogg", "mxf", "nut", "gif", "dv", "mjpeg", "yuv4mpegpipe", "apng", "png_pipe", "jpeg_pipe",
    "webp_pipe", "mp3", "wav", "aac", "flac",
)  # fmt: skip
"""Allowed demuxers of libav: those of files that hold their own streams. Audio formats are included because
their error message is then better: the file has no video stream."""
PADDING = 2**20
"""Pixels by which libav may count a frame as larger than it is, since it rounds up to blocks."""


@contextmanager
def open_container(
    source: Path | bytes, max_pixels: int = MAX_PIXELS, options: Mapping[str, str] | None = None
) -> Iterator[InputContainer]:
    """Open a video file.

    Args:
        source: path or bytes of the file.
        max_pixels: largest allowed number of pixels of a frame; libav refuses more before it allocates
            memory.
        options: further options of libav.

    Raises:
        ValueError: the file is a pipe or a device.
        av.FFmpegError: the file cannot be opened, or is not of one of FORMATS.
    """
    bounds = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"} | limits(max_pixels)
    if isinstance(source, Path):
        check_regular(source)
    # Without the name of the protocol, libav opens other files for a path such as `concat:a|b`.
    file = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
    with av.open(file, mode="r", options={**(options or {}), **bounds}) as container:
        for stream in container.streams.video:
            stream.codec_context.options = limits(max_pixels)
        yield container


def limits(max_pixels: int) -> dict[str, str]:
    """Return the options of a decoder that refuses frames of more than `max_pixels` pixels."""
    return {"max_pixels": str(max_pixels + PADDING)}
