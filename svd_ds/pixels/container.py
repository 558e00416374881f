"""Video files, opened for reading: the one place that opens media of unknown origin with PyAV.

libav knows files that are no media but tell it what to open: playlists (HLS, DASH, concat), session
descriptions (SDP), patterns of names. Only containers that hold their streams themselves are opened here, and
nothing but the file that was named is read.
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
"""libav's demuxers of files that hold their own streams. Those of sound give a better error than none."""
PADDING = 2**20
"""Pixels that libav may add to a frame of its own: it counts whole blocks."""


@contextmanager
def open_container(
    source: Path | bytes, max_pixels: int = MAX_PIXELS, options: Mapping[str, str] | None = None
) -> Iterator[InputContainer]:
    """Open a video file.

    Args:
        source: a path, or the file's bytes.
        max_pixels: of a frame; libav refuses more before it allocates them.
        options: further ones of libav.

    Raises:
        ValueError: the file is a pipe or a device.
        av.FFmpegError: it cannot be opened, or is no container of FORMATS.
    """
    bounds = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"} | limits(max_pixels)
    if isinstance(source, Path):
        check_regular(source)
    # Without the protocol's name, libav takes a path such as `concat:a|b` for an order to open others.
    file = io.BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
    with av.open(file, mode="r", options={**(options or {}), **bounds}) as container:
        for stream in container.streams.video:
            stream.codec_context.options = limits(max_pixels)
        yield container


def limits(max_pixels: int) -> dict[str, str]:
    """Options of a decoder."""
    return {"max_pixels": str(max_pixels + PADDING)}
