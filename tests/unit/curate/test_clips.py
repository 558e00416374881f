"""Clips cut from files: windows, cuts, sizes, copies."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from svd_ds.curate.clips import ClipCutSettings, Window, count_frames, plan_windows
from svd_ds.curate.media import copy_frames
from svd_ds.data.clips import read_frames
from svd_ds.data.decoding import decode
from svd_ds.pixels.frame import to_rgb
from tests.curation import run_stages
from tests.videos import counting, encode, moving_square, write_video


def settings(length: str, stride: str | None = None, size: int = 0) -> ClipCutSettings:
    return ClipCutSettings(length, length, stride, size, trim=0.0)


def starts(path: Path, length: str, stride: str | None = None) -> list[int]:
    _, rows = run_stages(path, settings(length, stride), path.parent / "out")
    assert "error" not in rows[-1], rows[-1]["error"]
    return sorted(row["start_frame"] for row in rows)


def test_clips_start_at_every_stride_and_have_the_frames_of_their_window(tmp_path: Path) -> None:
    frames = moving_square(50)
    frames[:, :, :8] = counting(50, height=48, width=8)
    path = write_video(tmp_path / "a.mp4", frames, fps=20)
    assert starts(path, "20") == [0, 20]
    assert starts(path, "20", "10") == [0, 10, 20, 30]
    assert starts(path, "1s", "0.5s") == [0, 10, 20, 30]
    _, rows = run_stages(path, settings("20"), tmp_path / "out")
    content = (tmp_path / "out" / rows[1]["media"]).read_bytes()
    levels = [round(to_rgb(frame)[:, :8].float().mean().item()) for frame in decode(content, range(20))]
    assert levels == pytest.approx([4 * number + 8 for number in range(20, 40)], abs=3)
    assert rows[1]["fps"] == 20 and rows[1]["end_frame"] == 40


def test_windows_do_not_cross_hard_cuts(tmp_path: Path) -> None:
    shots = [moving_square(30, speed=4, seed=seed) for seed in (1, 2)]
    white = np.full_like(shots[0][:25], 255)
    path = write_video(tmp_path / "cut.mp4", np.concatenate([shots[0], white, shots[1], white]))
    assert starts(path, "25", "5") == [0, 5, 30, 55, 60, 85]


def test_neither_motion_nor_a_flash_is_a_cut(tmp_path: Path) -> None:
    frames = moving_square(40, speed=6)
    frames[20] = 255
    assert starts(write_video(tmp_path / "flash.mp4", frames), "40") == [0]


def test_too_short_videos_and_bad_strides_are_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 16 + counting(10))
    _, rows = run_stages(path, settings("11"), tmp_path / "out")
    assert rows == [{"error": "its longest shot has 10 frames, but a clip needs at least 11"}]
    _, rows = run_stages(path, settings("5", "6"), tmp_path / "out")
    assert rows == [{"error": "the stride is 6 frames: it must be from 1 to the clip length of 5"}]


def test_lengths_are_frames_or_seconds() -> None:
    assert count_frames("48", Fraction(25)) == 48
    assert count_frames("2s", Fraction(30000, 1001)) == 60
    assert count_frames("0.5s", Fraction(25)) == 12
    for wrong in ("", "s", "2 s", "-1", "1.5"):
        with pytest.raises(ValueError, match="neither a number of frames"):
            count_frames(wrong, Fraction(25))


def test_size_keeps_the_aspect_and_never_enlarges(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_square(4, height=96, width=170))
    rows = [run_stages(path, settings("4", size=size), tmp_path / "out")[1][0] for size in (0, 48, 500)]
    assert [(row["height"], row["width"]) for row in rows] == [(96, 170), (48, 84), (96, 170)]


def test_rotated_video_is_stored_upright(tmp_path: Path) -> None:
    frames = np.zeros((4, 48, 64, 3), dtype=np.uint8)
    frames[:, :, :32] = 200
    path = write_video(tmp_path / "phone.mp4", frames)
    content = bytearray(path.read_bytes())
    # The display matrix of the track header: a quarter turn clockwise, as phones write it.
    matrix = content.index(b"tkhd") + 4 + 40
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(content)
    _, (row,) = run_stages(path, settings("4"), tmp_path / "out")
    assert row["method"] == "encoded"
    content = (tmp_path / "out" / row["media"]).read_bytes()
    upright = to_rgb(next(decode(content, [0]))).float()
    assert upright.shape == (64, 48, 3)
    assert upright[:30].mean() > 190 and upright[34:].mean() < 10, "the left half is now on top"


def test_image_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    Image.fromarray(moving_square(1, height=100, width=150)[0]).save(tmp_path / "a.png")
    _, (row,) = run_stages(tmp_path / "a.png", settings("2s", size=50), tmp_path / "out")
    assert (row["height"], row["width"], row["start_frame"], row["end_frame"]) == (50, 76, 0, 1)
    assert (tmp_path / "out" / row["media"]).read_bytes()[:2] == b"\xff\xd8"
    (tmp_path / "b.png").write_bytes(b"junk")
    _, (row,) = run_stages(tmp_path / "b.png", settings("2s"), tmp_path / "out")
    assert row["error"].startswith("it cannot be read")


PROBED = {
    "rate": "10",
    "codec": "h264",
    "pixel_format": "yuv420p",
    "constant_rate": True,
    "plain": True,
    "pixel_aspect": "1",
    "height": 48,
    "width": 64,
    "num_frames": 100,
    "keyframes": [0, 24, 50, 90],
}


def test_clips_are_snapped_to_keyframes_if_that_loses_little() -> None:
    """24 to 50 loses 1 of 27 frames, 50 to 90 loses 4 of 45; 95 to 100 would lose all, and is encoded."""
    shots = [(0, 10), (23, 50), (52, 90), (50, 94), (95, 100)]
    planned = plan_windows(shots, PROBED, ClipCutSettings("5", "100", trim=0.25))
    assert planned == [
        Window(0, 10),
        Window(24, 50, copied=True),
        Window(52, 90),
        Window(50, 90, copied=True),
        Window(95, 100),
    ]
    untrimmed = plan_windows(shots, PROBED, ClipCutSettings("5", "100", trim=-1))
    assert untrimmed == [Window(*shot) for shot in shots], "nothing is copied"


@pytest.mark.parametrize(
    "other",
    [{"codec": "vp9"}, {"pixel_format": "yuv420p10le"}, {"constant_rate": False}, {"plain": False},
     {"pixel_aspect": "4/3"}, {"height": 47}],
)  # fmt: skip
def test_videos_that_need_conversion_are_not_copied(other: dict[str, object]) -> None:
    shots, sized = [(0, 50)], ClipCutSettings("5", "100", size=40)
    assert plan_windows(shots, PROBED, ClipCutSettings("5", "100")) == [Window(0, 50, copied=True)]
    assert plan_windows(shots, {**PROBED, **other}, ClipCutSettings("5", "100")) == [Window(0, 50)]
    assert plan_windows(shots, PROBED, sized) == [Window(0, 50)]


def test_copied_clip_has_the_same_frames_as_the_video(tmp_path: Path) -> None:
    frames = np.concatenate([moving_square(24, speed=2, seed=seed) for seed in (1, 2, 3)])
    path = tmp_path / "a.mp4"
    path.write_bytes(encode(frames, keyframe_every=12))
    video = read_frames(path.read_bytes(), range(72), (48, 64))
    results, rows = run_stages(path, ClipCutSettings("10", "100"), tmp_path / "out")
    assert [(row["begin"], row["end"]) for row in results["cuts"]] == [(0, 24), (24, 48), (48, 72)]
    assert [row["method"] for row in rows] == ["copied"] * 3
    for row in rows:
        content = (tmp_path / "out" / row["media"]).read_bytes()
        span = slice(row["start_frame"], row["end_frame"])
        assert read_frames(content, range(24), (48, 64)).equal(video[span])
        # The loader seeks in the copy.
        assert read_frames(content, [17], (48, 64)).equal(video[span][17:18])
        with pytest.raises(ValueError, match="ends after"):
            read_frames(content, range(25), (48, 64))
    assert len(content) < len(path.read_bytes()) / 2


def test_container_without_an_index_is_encoded(tmp_path: Path) -> None:
    """A seek in a transport stream lands after the first frames."""
    path = tmp_path / "a.ts"
    path.write_bytes(encode(moving_square(48, speed=2), suffix="mpegts"))
    _, (row,) = run_stages(path, ClipCutSettings("1s", "20s"), tmp_path / "out")
    assert (row["method"], row["start_frame"], row["end_frame"]) == ("encoded", 0, 48)
    assert len(read_frames((tmp_path / "out" / row["media"]).read_bytes(), range(48), (48, 64))) == 48


def test_incomplete_copy_is_rejected(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_square(24))
    with av.open(str(path)) as container:
        first = container.streams.video[0].start_time or 0
    assert copy_frames(path, Fraction(24), first, 0, 24) is not None
    assert copy_frames(path, Fraction(24), first, 0, 25) is None
