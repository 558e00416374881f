"""Clips as files: encoded anew, or copied out of the video without touching a pixel."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace
from PIL import Image

from svd_ds.data.decoding import select_video_stream
from svd_ds.pixels.container import open_container
from svd_ds.pixels.frame import HD_HEIGHT

KEYFRAME_EVERY = 12
"""A loader that starts inside a clip decodes at most so many frames too many."""


class ClipEncoder:
    """Frames in, an H.264 file out.

    No B-frames, so that seeking is exact. One thread and no macroblock tree, so that the same frames give the
    same bytes: x264's assembly for the tree reads memory that nobody wrote (core 165, MALLOC_PERTURB_=1).
    """

    def __init__(self, rate: Fraction, height: int, width: int) -> None:
        # Left untagged, the colours are taken as to_rgb and all players take them.
        self._matrix = Colorspace.ITU709 if height >= HD_HEIGHT else Colorspace.ITU601
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, mode="w", format="mp4")
        options = {"crf": "18", "preset": "medium", "bf": "0", "g": str(KEYFRAME_EVERY), "mbtree": "0"}
        self._stream = self._container.add_stream("libx264", rate=rate, options=options)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        self._stream.thread_count = 1

    def add(self, pixels_HWC: np.ndarray) -> None:
        """The next frame: uint8 RGB, both sides even."""
        frame = VideoFrame.from_ndarray(pixels_HWC, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=self._matrix, threads=1)
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> bytes:
        self._container.mux(self._stream.encode())
        self._container.close()
        return self._buffer.getvalue()


def encode_still(pixels_HWC: np.ndarray) -> bytes:
    """uint8 RGB as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def copy_frames(path: Path, rate: Fraction, first: int, begin: int, end: int) -> bytes | None:
    """Frames `begin` to `end`, exclusive, of a video as an mp4 with the very bytes of the video.

    Both must be closed keyframes (`probe.closed_keyframes`), or `end` the video's; `rate` and `first` are
    its even clock (`probe.Packets`). None where the video does not give all of them.
    """
    buffer = io.BytesIO()
    with open_container(path) as source, av.open(buffer, mode="w", format="mp4") as target:
        stream = select_video_stream(source)
        assert stream.time_base is not None, "a stream with packets has a time base"
        copied = target.add_stream_from_template(stream)
        num_copied = 0
        start = first + round(begin / (rate * stream.time_base))
        source.seek(start, stream=stream)
        for packet in source.demux(stream):
            if packet.pts is None or packet.dts is None or packet.is_discard:
                continue
            number = round((packet.pts - first) * stream.time_base * rate)
            if number >= end and packet.is_keyframe:
                break
            if begin <= number < end:
                packet.pts, packet.dts = packet.pts - start, packet.dts - start
                packet.stream = copied
                target.mux(packet)
                num_copied += 1
    return buffer.getvalue() if num_copied == end - begin else None
