"""Conversion of decoded video frames to RGB as a player shows them: orientation, fields, transparency,
colours.

Every reader of videos uses `deinterlace` for the frames of a stream and `to_rgb` for the pixels of a frame.
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
"""Number of lines from which players interpret untagged video as BT.709; with fewer, as BT.601."""
UNSPECIFIED = 2
"""Value of AVCOL_SPC_UNSPECIFIED, AVCOL_TRC_UNSPECIFIED and AVCOL_PRI_UNSPECIFIED."""
LIMITED = 1
"""Value of AVCOL_RANGE_MPEG: in 8 bits black is 16 and white 235."""
UNREADABLE_MATRICES = {10: "BT.2020 with constant luminance", 11: "SMPTE ST 2085", 14: "ICtCp", 15: "IPT-C2"}
"""AVColorSpace value -> name of a matrix that swscale silently replaces by another."""
DOLBY_VISION = (Type.DOVI_METADATA, Type.DOVI_RPU_BUFFER)
STRAIGHT = (1, 0, 0, 1)
"""Linear part of the display matrix of a frame that is shown as it is stored."""
TILT = 0.05
"""Relative deviation of a display matrix from a multiple of 90 degrees: containers round its entries."""


def to_rgb(frame: VideoFrame) -> Tensor:
    """Convert a decoded frame to RGB as it is shown.

    The display matrix is applied, mirroring included; HDR and wide gamut are converted to SDR in BT.709
    (hdr.py); transparent pixels are composited on white.

    Returns:
        uint8 RGB, (H, W, 3).

    Raises:
        ValueError: the colours or the display matrix cannot be converted.
    """
    pixels_HWC = _convert_colours(frame)
    a, b, c, d = display_matrix(frame)
    if b or c:
        return _flip(pixels_HWC.transpose(0, 1), vertically=b < 0, horizontally=c < 0)
    return _flip(pixels_HWC, vertically=d < 0, horizontally=a < 0)


def is_plain(frame: VideoFrame) -> bool:
    """Return True if every player shows the stored pixels of a frame as they are."""
    return not (
        frame.interlaced_frame
        or display_matrix(frame) != STRAIGHT
        or _is_wide(frame)
        or _has_alpha(frame.format.name)
    )


def swaps_height_and_width(frame: VideoFrame) -> bool:
    """Return True if width and height are swapped when a frame is shown."""
    return display_matrix(frame)[0] == 0


def display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """Return the signs of the linear part (a, b, c, d) of a frame's display matrix.

    A stored pixel (x, y) is shown at (a x + c y, b x + d y), y downwards (libavutil/display.h).

    Raises:
        ValueError: the matrix rotates the frame by an angle that is not a multiple of 90 degrees.
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
    raise ValueError(
        f"its display matrix ({a}, {b}, {c}, {d}) does not rotate it by a multiple of 90 degrees"
    )


def deinterlace(frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
    """Yield the frames of a stream in order, the interlaced ones deinterlaced by libavfilter's bwdif.

    The number of frames and their times do not change: the rate is that of frames, not of fields.

    Raises:
        ValueError: an interlaced frame is too small for the filter.
    """
    graph: Graph | None = None
    shape: tuple[object, ...] = ()
    times: deque[VideoFrame] = deque()
    for frame in frames:
        now = (frame.width, frame.height, frame.format.name)
        if graph is not None and now != shape:
            yield from _filtered(graph, times, is_end=True)
            graph = None
        if graph is None:
            if not frame.interlaced_frame:
                yield frame
                continue
            graph, shape = _deinterlacer(frame), now
        times.append(frame)
        graph.push(frame)
        yield from _filtered(graph, times)
    if graph is not None:
        yield from _filtered(graph, times, is_end=True)


def _filtered(graph: Graph, originals: deque[VideoFrame], is_end: bool = False) -> Iterator[VideoFrame]:
    """Yield the frames that a filter has ready, with the times of the original frames."""
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
    """Make a filter graph for frames of the size and format of `frame`.

    Raises:
        ValueError: the frame is too small for the filter.
    """
    if frame.width < 4 or frame.height < 4:
        raise ValueError(
            f"it is interlaced, and its {frame.height} x {frame.width} pixels are too few to deinterlace"
        )
    graph = Graph()
    graph.threads = 1
    source = graph.add(
        "buffer",
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base={frame.time_base}"
        f":colorspace={frame.colorspace}:range={frame.color_range}",
    )
    # Progressive frames among the interlaced ones are not changed.
    bwdif = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
    sink = graph.add("buffersink")
    source.link_to(bwdif)
    bwdif.link_to(sink)
    graph.configure()
    return graph


def _side_data(frame: VideoFrame) -> list[SideData]:
    container: Any = frame.side_data  # PyAV's stub describes another class.
    return list(container)


def _flip(pixels_HWC: Tensor, vertically: bool, horizontally: bool) -> Tensor:
    axes = [axis for axis, wanted in ((0, vertically), (1, horizontally)) if wanted]
    return pixels_HWC.flip(axes) if axes else pixels_HWC


def _convert_colours(frame: VideoFrame) -> Tensor:
    """Convert the colours of a frame; uint8 RGB, (H, W, 3), oriented as stored.

    Raises:
        ValueError: the colours cannot be converted.
    """
    if frame.colorspace in UNREADABLE_MATRICES:
        raise ValueError(
            f"its colours are coded as {UNREADABLE_MATRICES[frame.colorspace]}, which is not supported"
        )
    if frame.color_trc == UNSPECIFIED and any(data.type in DOLBY_VISION for data in _side_data(frame)):
        raise ValueError("it is Dolby Vision without a base layer in HDR10 or HLG, which is not supported")
    if _is_wide(frame):
        return _to_sdr(frame)
    if _has_alpha(frame.format.name):
        return _composite_on_white(frame)
    if frame.format.name.startswith("gray") and frame.color_range == LIMITED:
        return _expand_grey(frame)
    pixels = frame.reformat(format="rgb24", src_colorspace=_matrix(frame), threads=1).to_ndarray()
    return torch.from_numpy(pixels)


def _is_wide(frame: VideoFrame) -> bool:
    """Return True if the transfer or the primaries of a frame exceed those of SDR displays."""
    return frame.color_trc in hdr.HDR or frame.color_primaries in hdr.TO_709


def _to_sdr(frame: VideoFrame) -> Tensor:
    """Convert HDR or wide gamut to SDR; uint8 RGB, (H, W, 3)."""
    wide = frame.reformat(format="rgb48le", src_colorspace=_matrix(frame), threads=1).to_ndarray()
    coded = torch.from_numpy(wide.astype(np.float32)) / 65535
    return (hdr.to_sdr(coded, frame.color_trc, frame.color_primaries) * 255).round().to(torch.uint8)


def _expand_grey(frame: VideoFrame) -> Tensor:
    """Expand limited-range grey (16 to 235), which swscale takes for full range; uint8 RGB, (H, W, 3)."""
    wide = frame.reformat(format="rgb48le", threads=1).to_ndarray().astype(np.float32) * (255 / 65535)
    return torch.from_numpy(((wide - 16) * (255 / 219)).round().clip(0, 255).astype(np.uint8))


def _composite_on_white(frame: VideoFrame) -> Tensor:
    """Composite a transparent frame on white; uint8 RGB, (H, W, 3)."""
    rgba = frame.reformat(format="rgba", src_colorspace=_matrix(frame), threads=1).to_ndarray()
    pixels, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
    shown = (pixels * alpha + BACKGROUND * (255 - alpha) + 127) // 255
    return torch.from_numpy(shown.astype(np.uint8))


def _matrix(frame: VideoFrame) -> Colorspace | None:
    """Return the YUV matrix of a frame that does not name one; None if it does."""
    if frame.colorspace != UNSPECIFIED:
        return None
    if frame.color_trc in hdr.HDR or frame.color_primaries == ColorPrimaries.BT2020:
        return Colorspace.BT2020
    return Colorspace.ITU709 if frame.height >= HD_HEIGHT else Colorspace.ITU601


@cache
def _has_alpha(pixel_format: str) -> bool:
    return pixel_format == "pal8" or any(part.is_alpha for part in VideoFormat(pixel_format).components)
