"""Videos, contact sheets and images that users look at."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from svd_ds.video import contact_sheet, read_image, to_uint8, write_mp4


def moving_square(num_frames: int, height: int, width: int) -> Tensor:
    frames = torch.full((num_frames, 3, height, width), 40, dtype=torch.uint8)
    for t in range(num_frames):
        frames[t, 0, 8:24, 4 * t : 4 * t + 16] = 220
    return frames


def read_mp4(path: Path) -> tuple[np.ndarray, av.VideoStream]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), stream


def test_mp4_holds_the_frames_and_plays_in_browsers(tmp_path: Path) -> None:
    frames = moving_square(7, 48, 64)
    write_mp4(frames, tmp_path / "new" / "clip.mp4", fps=6)
    decoded, stream = read_mp4(tmp_path / "new" / "clip.mp4")
    assert decoded.shape == (7, 48, 64, 3)
    assert stream.average_rate == 6
    assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
    difference = decoded.astype(int) - frames.permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(difference).mean() < 4


def test_odd_sizes_and_fractional_rates_are_written(tmp_path: Path) -> None:
    write_mp4(moving_square(3, 49, 63), tmp_path / "odd.mp4", fps=29.97)
    decoded, stream = read_mp4(tmp_path / "odd.mp4")
    assert decoded.shape == (3, 48, 62, 3)
    assert float(stream.average_rate) == pytest.approx(29.97, abs=1e-3)


def test_contact_sheet_has_a_row_per_video_from_first_frame_to_last(tmp_path: Path) -> None:
    videos = [moving_square(14, 32, 80), 255 - moving_square(3, 32, 80)]
    contact_sheet(videos, tmp_path / "sheet.png")
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * 34 - 2, 8 * 82 - 2, 3)
    np.testing.assert_array_equal(sheet[:32, :80], videos[0][0].permute(1, 2, 0))
    np.testing.assert_array_equal(sheet[:32, -80:], videos[0][13].permute(1, 2, 0))
    np.testing.assert_array_equal(sheet[34:, 164:244], videos[1][2].permute(1, 2, 0))


@pytest.mark.parametrize("size", [(30, 90), (90, 30), (13, 7)])
def test_read_image_covers_and_crops_the_centre(tmp_path: Path, size: tuple[int, int]) -> None:
    picture = np.zeros((*size, 3), dtype=np.uint8)
    picture[size[0] // 2 - 2 : size[0] // 2 + 3, size[1] // 2 - 2 : size[1] // 2 + 3] = 255
    Image.fromarray(picture).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png", 24, 32)
    assert image.shape == (3, 24, 32) and image.dtype == torch.uint8
    assert image[:, 12, 16].min() > 200 and image[:, 0, 0].max() < 60


def test_read_image_errors_name_the_cause(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        read_image(tmp_path / "no.png", 8, 8)
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"text\.png is not an image"):
        read_image(tmp_path / "text.png", 8, 8)


def test_to_uint8_clamps_and_rounds() -> None:
    assert to_uint8(torch.tensor([-3.0, -1.0, 0.0, 1.0, 1.5])).tolist() == [0, 0, 128, 255, 255]
