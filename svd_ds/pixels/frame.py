"""Video frames as they are shown: orientation, fields, transparency and colours of a decoded frame.

Every reader of videos takes `deinterlace` for the frames of a stream and `to_rgb` for the pixels of a frame.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import av
import numpy as np
import torch
from av.filter import Graph
from av.sidedata.sidedata import SideData, Type
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, Colorspace
from torch import Tensor

from svd_ds.pixels import hdr
from svd_ds.pixels.still import BACKGROUND

HD_HEIGHT = 720
"""Untagged video is BT.709 from so many lines on and BT.601 below, as players take it."""
UNSPECIFIED = 2
"""AVCOL_SPC_UNSPECIFIED, and the same of transfers and primaries."""
LIMITED = 1
"""AVCOL_RANGE_MPEG: of 8 bits, black is 16 and white 235."""
UNREADABLE_MATRICES = {10: "BT.2020 with constant luminance", 11: "SMPTE ST 2085", 14: "ICtCp", 15: "IPT-C2"}
"""AVColorSpace values that swscale takes for another matrix, without an error."""
DOLBY_VISION = (Type.DOVI_METADATA, Type.DOVI_RPU_BUFFER)
STRAIGHT = (1, 0, 0, 1)
"""The linear part of the display matrix of a frame that is shown as it is stored."""
TILT = 0.05
"""Share by which a display matrix may miss a multiple of 90 degrees: containers round its entries."""


def to_rgb(frame: VideoFrame) -> Tensor:
    """A decoded frame as it is shown: uint8 RGB, (H, W, 3).

    The display matrix is applied, mirrors included; HDR and wide gamut become SDR in BT.709 (hdr.py); what is
    transparent is composited on white.

    Raises:
        ValueError: the frame's colours or its display matrix cannot be converted.
    """
    pixels_HWC = _colours(frame)
    a, b, c, d = display_matrix(frame)
    if b or c:
        return _flipped(pixels_HWC.transpose(0, 1), vertically=b < 0, horizontally=c < 0)
    return _flipped(pixels_HWC, vertically=d < 0, horizontally=a < 0)


def is_plain(frame: VideoFrame) -> bool:
    """Whether any player and decoder shows the frame's stored pixels as they are."""
    return not (
        frame.interlaced_frame
        or display_matrix(frame) != STRAIGHT
        or _is_wide(frame)
        or _has_alpha(frame.format.name)
    )


def swaps_height_and_width(frame: VideoFrame) -> bool:
    """Whether width and height change places when the frame is shown."""
    return display_matrix(frame)[0] == 0


def display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """Signs of the linear part (a, b, c, d) of a frame's display matrix: one of eight.

    A stored pixel (x, y) is shown at (a x + c y, b x + d y), y downwards (libavutil/display.h).

    Raises:
        ValueError: the matrix turns the frame by an angle that is no multiple of 90 degrees.
    """
    for data in _side_data(frame):
        if data.type == Type.DISPLAYMATRIX:
            a, b, _, c, d, *_ = np.frombuffer(bytes(data), dtype=np.int32).tolist()
            break
    else:
        return STRAIGHT
    along, across = min(abs(a), abs(d)), min(abs(b), abs(c))
    if not along and not across:
        return STRAIGHT
    if max(abs(b), abs(c)) <= TILT * along:
        return (1 if a > 0 else -1, 0, 0, 1 if d > 0 else -1)
    if max(abs(a), abs(d)) <= TILT * across:
        return (0, 1 if b > 0 else -1, 1 if c > 0 else -1, 0)
    raise ValueError(f"its display matrix ({a}, {b}, {c}, {d}) turns it by no multiple of 90 degrees")


def deinterlace(frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
    """The frames of a stream in their order, the interlaced ones deinterlaced (libavfilter's bwdif).

    As many frames come out as go in, with their times: the rate stays that of the frames, not of the fields.
    """
    graph: Graph | None = None
    shape: tuple[object, ...] = ()
    times: deque[VideoFrame] = deque()
    for frame in frames:
        now = (frame.width, frame.height, frame.format.name)
        if graph is not None and now != shape:
            yield from _drained(graph, times, is_end=True)
            graph = None
        if graph is None:
            if not frame.interlaced_frame:
                yield frame
                continue
            graph, shape = _deinterlacer(frame), now
        times.append(frame)
        graph.push(frame)
        yield from _drained(graph, times)
    if graph is not None:
        yield from _drained(graph, times, is_end=True)


def _drained(graph: Graph, originals: deque[VideoFrame], is_end: bool = False) -> Iterator[VideoFrame]:
    if is_end:
        graph.push(None)
    while True:
        try:
            frame = graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return
        original = originals.popleft()
        frame.pts, frame.dts, frame.time_base = original.pts, original.dts, original.time_base
        yield frame


def _deinterlacer(frame: VideoFrame) -> Graph:
    if frame.width < 4 or frame.height < 4:
        raise ValueError(f"it is interlaced, with {frame.height} x {frame.width} pixels too small to mend")
    graph = Graph()
    graph.threads = 1
    source = graph.add(
        "buffer",
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base={frame.time_base}"
        f":colorspace={frame.colorspace}:range={frame.color_range}",
    )
    # Progressive frames among the interlaced ones pass through untouched.
    bwdif = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
    sink = graph.add("buffersink")
    source.link_to(bwdif)
    bwdif.link_to(sink)
    graph.configure()
    return graph


def _side_data(frame: VideoFrame) -> list[SideData]:
    container: Any = frame.side_data  # PyAV's stub describes another class.
    return list(container)


def _flipped(pixels_HWC: Tensor, vertically: bool, horizontally: bool) -> Tensor:
    axes = [axis for axis, wanted in ((0, vertically), (1, horizontally)) if wanted]
    return pixels_HWC.flip(axes) if axes else pixels_HWC


def _colours(frame: VideoFrame) -> Tensor:
    if frame.colorspace in UNREADABLE_MATRICES:
        raise ValueError(
            f"its colours are coded as {UNREADABLE_MATRICES[frame.colorspace]}, which is not read"
        )
    if frame.color_trc == UNSPECIFIED and any(data.type in DOLBY_VISION for data in _side_data(frame)):
        raise ValueError("it is Dolby Vision without a base layer in HDR10 or HLG, which is not read")
    if _is_wide(frame):
        return _sdr(frame)
    if _has_alpha(frame.format.name):
        return _composited(frame)
    if frame.format.name.startswith("gray") and frame.color_range == LIMITED:
        return _limited_grey(frame)
    pixels = frame.reformat(format="rgb24", src_colorspace=_matrix(frame), threads=1).to_ndarray()
    return torch.from_numpy(pixels)


def _is_wide(frame: VideoFrame) -> bool:
    """Whether the frame's transfer or primaries are beyond those of SDR displays."""
    return frame.color_trc in hdr.HDR or frame.color_primaries in hdr.TO_709


def _sdr(frame: VideoFrame) -> Tensor:
    wide = frame.reformat(format="rgb48le", src_colorspace=_matrix(frame), threads=1).to_ndarray()
    coded = torch.from_numpy(wide.astype(np.float32)) / 65535
    return (hdr.to_sdr(coded, frame.color_trc, frame.color_primaries) * 255).round().to(torch.uint8)


def _limited_grey(frame: VideoFrame) -> Tensor:
    """Grey from 16 to 235, which swscale takes for the full range."""
    wide = frame.reformat(format="rgb48le", threads=1).to_ndarray().astype(np.float32) * (255 / 65535)
    return torch.from_numpy(((wide - 16) * (255 / 219)).round().clip(0, 255).astype(np.uint8))


def _composited(frame: VideoFrame) -> Tensor:
    rgba = frame.reformat(format="rgba", src_colorspace=_matrix(frame), threads=1).to_ndarray()
    pixels, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
    shown = (pixels * alpha + BACKGROUND * (255 - alpha) + 127) // 255
    return torch.from_numpy(shown.astype(np.uint8))


def _matrix(frame: VideoFrame) -> Colorspace | None:
    """The YUV matrix of a frame that does not say its own, None of one that does."""
    if frame.colorspace != UNSPECIFIED:
        return None
    if frame.color_trc in hdr.HDR or frame.color_primaries == ColorPrimaries.BT2020:
        return Colorspace.BT2020
    return Colorspace.ITU709 if frame.height >= HD_HEIGHT else Colorspace.ITU601


@cache
def _has_alpha(pixel_format: str) -> bool:
    return pixel_format == "pal8" or any(part.is_alpha for part in VideoFormat(pixel_format).components)
