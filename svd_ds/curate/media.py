"""Clip files: encoded, or copied from the video without changing a pixel."""

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

KEYFRAME_INTERVAL = 12
"""Keyframe distance in frames: a loader that starts inside a clip decodes at most this many extra frames."""


class ClipEncoder:
    """Encodes frames to an H.264 file.

    It uses no B-frames, so that seeking is exact, and one thread and no macroblock tree, so that the same
    frames give the same bytes: x264's assembly for the tree reads uninitialised memory (core 165,
    MALLOC_PERTURB_=1).
    """

    def __init__(self, rate: Fraction, height: int, width: int) -> None:
        # Untagged colours are interpreted by to_rgb and by all players in this way.
        self._matrix = Colorspace.ITU709 if height >= HD_HEIGHT else Colorspace.ITU601
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, mode="w", format="mp4")
        options = {"crf": "18", "preset": "medium", "bf": "0", "g": str(KEYFRAME_INTERVAL), "mbtree": "0"}
        self._stream = self._container.add_stream("libx264", rate=rate, options=options)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        self._stream.thread_count = 1

    def add(self, pixels: np.ndarray) -> None:
        """Add the next frame: uint8 RGB, both sides even."""
        frame = VideoFrame.from_ndarray(pixels, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=self._matrix, threads=1)
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> bytes:
        """Return the bytes of the file."""
        self._container.mux(self._stream.encode())
        self._container.close()
        return self._buffer.getvalue()


def encode_still(pixels: np.ndarray) -> bytes:
    """Encode uint8 RGB as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def copy_frames(path: Path, rate: Fraction, first_pts: int, begin: int, end: int) -> bytes | None:
    """Copy frames `begin` to `end`, exclusive, of a video to an mp4 without encoding.

    Args:
        path: the video.
        rate: its constant frame rate (`probe.PacketSummary`).
        first_pts: presentation time of its first frame.
        begin: number of a closed keyframe (`probe.closed_keyframes`).
        end: number of a closed keyframe, or the number of frames in the video.

    Returns:
        The bytes of the file; None if the video does not have all of the frames.
    """
    buffer = io.BytesIO()
    with open_container(path) as source, av.open(buffer, mode="w", format="mp4") as target:
        stream = select_video_stream(source)
        assert stream.time_base is not None, "a stream with packets has a time base"
        copied = target.add_stream_from_template(stream)
        num_copied = 0
        start = first_pts + round(begin / (rate * stream.time_base))
        source.seek(start, stream=stream)
        for packet in source.demux(stream):
            if packet.pts is None or packet.dts is None or packet.is_discard:
                continue
            number = round((packet.pts - first_pts) * stream.time_base * rate)
            if number >= end and packet.is_keyframe:
                break
            if begin <= number < end:
                packet.pts, packet.dts = packet.pts - start, packet.dts - start
                packet.stream = copied
                target.mux(packet)
                num_copied += 1
    return buffer.getvalue() if num_copied == end - begin else None
