"""Video frames are converted as players show them: rotated, mirrored, deinterlaced."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from svd_ds.curate.clips import ClipCutSettings
from svd_ds.data.clips import read_frames
from svd_ds.data.decoding import decode
from svd_ds.data.external_shards import measure_media
from svd_ds.pixels.frame import deinterlace, is_plain, swaps_height_and_width, to_rgb
from tests.curation import run_stages
from tests.videos import encode

ONE = 1 << 16
MATRICES = {
    "identity": (1, 0, 0, 1), "half turn": (-1, 0, 0, -1), "hflip": (-1, 0, 0, 1), "vflip": (1, 0, 0, -1),
    "clockwise": (0, 1, -1, 0), "anticlockwise": (0, -1, 1, 0), "transpose": (0, 1, 1, 0),
    "transverse": (0, -1, -1, 0),
}  # fmt: skip


def corners() -> np.ndarray:
    """Frames, uint8, (4, 48, 64, 3): red top left, green top right, blue bottom left, yellow bottom right."""
    frame = np.zeros((48, 64, 3), dtype=np.uint8)
    frame[:24, :32], frame[:24, 32:] = (220, 40, 40), (40, 200, 40)
    frame[24:, :32], frame[24:, 32:] = (40, 40, 220), (220, 220, 40)
    return np.broadcast_to(frame, (4, *frame.shape)).copy()


def with_matrix(content: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """Set the linear part of the display matrix in the track header of an mp4 or mov."""
    patched = bytearray(content)
    place = content.index(b"tkhd") + 4 + 40
    patched[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return bytes(patched)


def as_shown(frame_HWC: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """Apply a display matrix by its definition: the pixel (x, y) from the centre is shown at (a x + c y, b x
    + d y)."""
    height, width = frame_HWC.shape[:2]
    shown_size = (height, width) if a else (width, height)
    shown = np.zeros((*shown_size, 3), dtype=np.uint8)
    for y in range(height):
        for x in range(width):
            u, v = 2 * x - (width - 1), 2 * y - (height - 1)
            column, row = (a * u + c * v + shown_size[1] - 1) // 2, (b * u + d * v + shown_size[0] - 1) // 2
            shown[row, column] = frame_HWC[y, x]
    return shown


def assert_corners(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    for rows in (slice(4, 16), slice(-16, -4)):
        for columns in (slice(4, 16), slice(-16, -4)):
            error = np.abs(found[rows, columns].astype(int) - wanted[rows, columns])
            assert error.mean() < 12, (rows, columns)


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize("name", MATRICES)
def test_display_matrices_are_applied(name: str, suffix: str) -> None:
    matrix = MATRICES[name]
    content = with_matrix(encode(corners(), suffix=suffix), *(ONE * entry for entry in matrix))
    wanted = as_shown(corners()[0], *matrix)
    (frame,) = decode(content, [0])
    assert_corners(to_rgb(frame).numpy(), wanted)
    assert is_plain(frame) == (name == "identity") and swaps_height_and_width(frame) == (matrix[0] == 0)
    assert measure_media(content, still=False) == (4, 24.0, *wanted.shape[:2]), "the index has the shown size"
    resized = read_frames(content, [0], wanted.shape[:2])
    assert_corners(resized[0].permute(1, 2, 0).numpy(), wanted)


@pytest.mark.parametrize("name", ["hflip", "vflip", "anticlockwise", "transpose"])
def test_curation_writes_clips_as_shown(name: str, tmp_path: Path) -> None:
    matrix = MATRICES[name]
    path = tmp_path / "phone.mp4"
    path.write_bytes(with_matrix(encode(corners()), *(ONE * entry for entry in matrix)))
    _, (row,) = run_stages(path, ClipCutSettings("4", "4", trim=0.9), tmp_path / "out")
    assert row["method"] == "encoded"
    (frame,) = decode((tmp_path / "out" / row["media"]).read_bytes(), [0])
    assert_corners(to_rgb(frame).numpy(), as_shown(corners()[0], *matrix))


def test_slanted_display_matrix_is_refused() -> None:
    content = with_matrix(encode(corners()), 46341, 46341, -46341, 46341)
    (frame,) = decode(content, [0])
    with pytest.raises(ValueError, match=r"\(46341, 46341, -46341, 46341\) does not rotate it by a multiple"):
        to_rgb(frame)


def moving_bars(num_fields: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frames, uint8, (T, H, W, 3), of soft vertical bars that move 4 pixels a field."""
    columns = np.arange(width)
    levels = [128 + 100 * np.sin(2 * np.pi * (columns - 4 * number) / 32) for number in range(num_fields)]
    return np.broadcast_to(np.array(levels)[:, None, :, None], (num_fields, height, width, 3)).astype(
        np.uint8
    )


def interlaced(codec: str, suffix: str, num_frames: int = 12) -> bytes:
    """Encode an interlaced video: the two fields of a frame are half a frame apart in time."""
    fields = moving_bars(2 * num_frames)
    options = {
        "libx264": {"x264-params": "tff=1", "crf": "12", "g": "6", "bf": "2"},
        "mpeg2video": {"flags": "+ilme+ildct", "qscale": "2", "g": "6", "bf": "2"},
    }[codec]
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format=suffix) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *fields.shape[1:3], "yuv420p"
        stream.thread_count = 1
        stream.time_base = Fraction(1, 25)
        for number in range(num_frames):
            woven = fields[2 * number].copy()
            woven[1::2] = fields[2 * number + 1, 1::2]
            frame = av.VideoFrame.from_ndarray(woven, format="rgb24").reformat(format="yuv444p")
            frame = frame.reformat(format="yuv420p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def comb(frame_HWC: np.ndarray) -> float:
    """Mean difference of neighbouring rows: about 0 for vertical bars, large if fields are interlaced."""
    return float(np.abs(np.diff(frame_HWC[8:-8].astype(int), axis=0)).mean())


INTERLACED = [("libx264", "mp4"), ("libx264", "matroska"), ("mpeg2video", "mpeg"), ("mpeg2video", "matroska")]


@pytest.mark.parametrize(("codec", "suffix"), INTERLACED)
def test_interlaced_video_is_deinterlaced_in_shards(codec: str, suffix: str) -> None:
    content = interlaced(codec, suffix)
    with av.open(io.BytesIO(content)) as container:
        raw = list(container.decode(video=0))
    assert raw[5].interlaced_frame and comb(raw[5].to_ndarray(format="rgb24")) > 10
    shown = [to_rgb(frame).numpy() for frame in decode(content, range(12))]
    assert len(shown) == 12 and max(map(comb, shown)) < 3
    # Frame k shows one of its two fields, always the same: the bars move evenly.
    fields = moving_bars(24)[:, 16:-16].astype(int)
    errors = [
        max(np.abs(shown[k][16:-16] - fields[2 * k + second]).mean() for k in range(12)) for second in (0, 1)
    ]
    assert min(errors) < 12, errors


@pytest.mark.parametrize(("codec", "suffix"), INTERLACED[:3])
def test_interlaced_video_is_neither_copied_nor_combed_by_curation(
    codec: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"camera.{ {'matroska': 'mkv', 'mpeg': 'mpg'}.get(suffix, suffix) }"
    path.write_bytes(interlaced(codec, suffix))
    _, rows = run_stages(path, ClipCutSettings("4", "100", trim=0.9), tmp_path / "out")
    assert [row.get("method") for row in rows] == ["encoded"], rows
    content = (tmp_path / "out" / rows[0]["media"]).read_bytes()
    assert (rows[0]["start_frame"], rows[0]["end_frame"]) == (0, 12)
    for frame in decode(content, range(12)):
        assert is_plain(frame) and comb(to_rgb(frame).numpy()) < 3


def test_deinterlacing_keeps_frame_count_and_times_and_progressive_frames() -> None:
    with av.open(io.BytesIO(interlaced("libx264", "mp4"))) as container:
        woven = list(container.decode(video=0))
    with av.open(io.BytesIO(encode(corners()))) as container:
        plain = list(container.decode(video=0))
    found = list(deinterlace([*plain, *woven, *plain]))
    assert [(f.pts, f.time_base, f.width) for f in found] == [
        (f.pts, f.time_base, f.width) for f in [*plain, *woven, *plain]
    ]
    for ours, theirs in zip([*found[:4], *found[-4:]], [*plain, *plain], strict=True):
        assert (ours.to_ndarray() == theirs.to_ndarray()).all()
    assert not any(frame.interlaced_frame for frame in found)


def test_transparent_video_is_shown_on_white() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4)).astype(np.uint8)
    pixels[:8, :, 3], pixels[8:, :, 3] = 0, 255
    shown = to_rgb(av.VideoFrame.from_ndarray(pixels, format="rgba")).numpy()
    assert (shown[:8] == 255).all() and (shown[8:] == pixels[8:, :, :3]).all()


@pytest.mark.parametrize("limited", [True, False])
def test_grey_of_limited_range_is_expanded(limited: bool) -> None:
    levels = np.repeat(np.array([[16, 64, 128, 200, 235, 250]], dtype=np.uint8), 16, axis=0)
    frame = av.VideoFrame.from_ndarray(levels, format="gray")
    frame.color_range = 1 if limited else 2
    wanted = [0, 56, 130, 214, 255, 255] if limited else levels[0].tolist()
    assert np.abs(to_rgb(frame).numpy()[0].astype(int) - np.array(wanted)[:, None]).max() <= 1


@pytest.mark.parametrize(("matrix", "name"), [(10, "constant luminance"), (14, "ICtCp")])
def test_colours_that_swscale_misreads_are_refused(matrix: int, name: str) -> None:
    frame = av.VideoFrame(16, 16, "yuv420p")
    frame.colorspace = matrix
    with pytest.raises(ValueError, match=name):
        to_rgb(frame)
