"""HDR is converted to SDR by the numbers of the standards, and matches the SDR of the same scene."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorPrimaries, ColorTrc

from svd_ds.curate.clips import ClipCutSettings
from svd_ds.data.decoding import decode
from svd_ds.pixels.frame import is_plain, to_rgb
from svd_ds.pixels.hdr import TO_709, to_sdr
from tests.curation import run_stages

PQ, HLG = int(ColorTrc.SMPTE2084), int(ColorTrc.ARIB_STD_B67)
COLOURS = [(200, 30, 30), (30, 180, 40), (40, 60, 200), (220, 200, 40), (128, 128, 128), (230, 230, 230)]


def pq_code(light: np.ndarray) -> np.ndarray:
    """Encode light in cd/m2 as PQ (SMPTE ST 2084, equation 5.2)."""
    power = (light / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg_code(light: np.ndarray) -> np.ndarray:
    """Encode light on a display of 1000 cd/m2 as HLG (inverse of ITU-R BT.2100-2, table 5)."""
    luminance = light @ np.array([0.2627, 0.6780, 0.0593])
    scene = light / 1000 * np.maximum(luminance / 1000, 1e-9)[..., None] ** (1 / 1.2 - 1)
    upper = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), upper)


CODES = {PQ: pq_code, HLG: hlg_code}


def scene() -> np.ndarray:
    """Frame with a column of each colour, uint8, (32, 96, 3)."""
    return np.repeat(np.repeat(np.array([COLOURS], dtype=np.uint8), 32, 0), 16, 1)


def in_hdr(pixels: np.ndarray, transfer: int) -> np.ndarray:
    """Frame with the same colours in BT.2020, SDR white at 203 cd/m2: float RGB in [0, 1]."""
    to_2020 = np.linalg.inv(np.array(TO_709[ColorPrimaries.BT2020]))
    return CODES[transfer](203 * np.clip((pixels / 255) ** 2.4 @ to_2020.T, 0, None))


def encode_hdr(transfer: int, codec: str, suffix: str, pixel_format: str) -> bytes:
    coded = (in_hdr(scene(), transfer) * 65535).round().astype(np.uint16)
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format=suffix) as container:
        options = {"crf": "4", "g": "4"} | ({"x265-params": "log-level=none"} if codec == "libx265" else {})
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *coded.shape[:2], pixel_format
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = transfer, 9, 9
        context.color_range = 1
        stream.thread_count = 1
        for _ in range(8):
            frame = av.VideoFrame.from_ndarray(coded, format="rgb48le")
            frame = frame.reformat(format=pixel_format, dst_colorspace=9, dst_color_range=1)
            frame.color_trc, frame.color_primaries = transfer, 9
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_tone_curve_at_black_grey_white_and_highlights(transfer: int) -> None:
    """Light below the knee of 89 cd/m2 is not changed, and 1000 cd/m2 is mapped to white."""
    light = np.array([[[level] * 3 for level in (0.0, 10.0, 50.0, 203.0, 500.0, 1000.0)]])
    found = to_sdr(torch.from_numpy(CODES[transfer](light)).float(), transfer, 2)[0, :, 1]
    assert found[:3].tolist() == pytest.approx(
        [(level / 203) ** (1 / 2.4) for level in (0, 10, 50)], abs=0.005
    )
    assert found.diff().min() > 0 and 0.85 < found[3] < 0.95 and found[5] == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_hdr_colours_match_the_sdr_scene(transfer: int) -> None:
    found = to_sdr(torch.from_numpy(in_hdr(scene(), transfer)).float(), transfer, 9).numpy() * 255
    assert np.abs(found - scene()).max() < 30, "only highlights are compressed"
    dark = scene() // 2
    found = to_sdr(torch.from_numpy(in_hdr(dark, transfer)).float(), transfer, 9).numpy() * 255
    assert np.abs(found - dark).max() < 3


@pytest.mark.parametrize("primaries", TO_709)
def test_white_stays_white_in_every_gamut(primaries: ColorPrimaries) -> None:
    white = torch.full((1, 1, 3), 0.8)
    assert torch.allclose(to_sdr(white, 1, primaries), white, atol=2e-3)
    red = torch.tensor([[[0.8, 0.3, 0.3]]])
    assert to_sdr(red, 1, primaries)[0, 0, 0] > 0.81, "a wide red is redder in BT.709"


@pytest.mark.parametrize(
    ("codec", "suffix", "pixel_format"),
    [
        ("libx265", "mp4", "yuv420p10le"),
        ("libx265", "mov", "yuv420p10le"),
        ("libx264", "matroska", "yuv420p"),
    ],
)
@pytest.mark.parametrize("transfer", [PQ, HLG], ids=["PQ", "HLG"])
def test_hdr_files_are_tone_mapped_by_every_reader(
    transfer: int, codec: str, suffix: str, pixel_format: str, tmp_path: Path
) -> None:
    content = encode_hdr(transfer, codec, suffix, pixel_format)
    path = tmp_path / f"hdr.{suffix.replace('matroska', 'mkv')}"
    path.write_bytes(content)
    _, rows = run_stages(path, ClipCutSettings("4", "100", trim=0.9), tmp_path / "out")
    assert [row.get("method") for row in rows] == ["encoded"], rows
    for each in (content, (tmp_path / "out" / rows[0]["media"]).read_bytes()):
        (frame,) = decode(each, [3])
        assert is_plain(frame) == (each is not content)
        shown = to_rgb(frame).numpy().astype(int)
        for number, colour in enumerate(COLOURS):
            middle = shown[8:24, 16 * number + 6 : 16 * number + 10].mean((0, 1))
            assert np.abs(middle - colour).max() < 36, (number, middle)
