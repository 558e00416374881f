"""From files to clips: windows, cuts, sizes, captions."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svd_ds.data.clips import decode, to_rgb
from svd_ds.data.ingest import RawClip, count_frames, encode, free_key, read_image, read_video, told_of
from tests.videos import counting, moving_square, write_video


def starts(path: Path, length: str, stride: str | None = None) -> list[int]:
    return [clip.start_frame for clip in read_video(path, length, stride, 0)]


def test_windows(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", counting(50), fps=20)
    assert starts(path, "20") == [0, 20]
    assert starts(path, "20", "10") == [0, 10, 20, 30]
    assert starts(path, "1s", "0.5s") == [0, 10, 20, 30]
    clips = list(read_video(path, "20", None, 0))
    assert [round(frame.mean()) for frame in clips[1].frames] == pytest.approx(
        [4 * number + 8 for number in range(20, 40)], abs=2
    )
    assert clips[0].rate == 20


def test_windows_do_not_cross_hard_cuts(tmp_path: Path) -> None:
    shots = [moving_square(30, speed=4, seed=seed) for seed in (1, 2)]
    black, white = np.zeros_like(shots[0][:25]), np.full_like(shots[0][:25], 255)
    path = write_video(tmp_path / "cut.mp4", np.concatenate([shots[0], black, shots[1], white]))
    assert starts(path, "25", "5") == [0, 5, 30, 55, 60, 85]


def test_neither_motion_nor_a_flash_is_a_cut(tmp_path: Path) -> None:
    frames = moving_square(40, speed=6)
    frames[20] = 255
    assert starts(write_video(tmp_path / "flash.mp4", frames), "40") == [0]


def test_too_short_and_bad_strides(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", counting(10))
    with pytest.raises(ValueError, match="longest shot has 10 frames, and a clip needs 11"):
        starts(path, "11")
    with pytest.raises(ValueError, match="stride of 6 frames is not between 1 and the clip's 5"):
        starts(path, "5", "6")


def test_lengths() -> None:
    assert count_frames("48", Fraction(25)) == 48
    assert count_frames("2s", Fraction(30000, 1001)) == 60
    assert count_frames("0.5s", Fraction(25)) == 12
    for wrong in ("", "s", "2 s", "-1", "1.5"):
        with pytest.raises(ValueError, match="neither a number of frames"):
            count_frames(wrong, Fraction(25))


def test_size_keeps_the_aspect_and_never_enlarges(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_square(4, height=96, width=170))
    shapes = [next(read_video(path, "4", None, size)).frames[0].shape for size in (0, 48, 500)]
    assert shapes == [(96, 170, 3), (48, 84, 3), (96, 170, 3)]


def test_rotated_video_is_stood_upright(tmp_path: Path) -> None:
    frames = np.zeros((4, 48, 64, 3), dtype=np.uint8)
    frames[:, :, :32] = 200
    path = write_video(tmp_path / "phone.mp4", frames)
    content = bytearray(path.read_bytes())
    # The display matrix of the track header: a quarter turn clockwise, as phones write it.
    matrix = content.index(b"tkhd") + 4 + 40
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(content)
    upright = next(read_video(path, "4", None, 0)).frames[0]
    assert upright.shape == (64, 48, 3)
    assert upright[:30].mean() > 190 and upright[34:].mean() < 10, "the left half is now on top"


def test_colours_survive(tmp_path: Path) -> None:
    frames = np.zeros((4, 64, 96, 3), dtype=np.uint8)
    frames[:, :, :32], frames[:, :, 32:64], frames[:, :, 64:] = (200, 30, 30), (30, 180, 40), (30, 40, 200)
    media, content = encode(RawClip(list(frames), Fraction(24), 0))
    assert media == "mp4"
    for frame in decode(content, range(4)):
        pixels = to_rgb(frame).permute(1, 2, 0).numpy().astype(int)
        for column in (16, 48, 80):
            assert np.abs(pixels[32, column] - frames[0, 32, column]).max() <= 6


ENCODE = """
import hashlib
from fractions import Fraction
from svd_ds.data.ingest import RawClip, encode
from tests.videos import moving_square
print(hashlib.sha256(encode(RawClip(list(moving_square(25, 144, 192)), Fraction(24), 0))[1]).hexdigest())
"""


def test_encoding_does_not_depend_on_what_memory_held_before() -> None:
    clip = RawClip(list(moving_square(25, 144, 192)), Fraction(24), 0)
    environment = {**os.environ, "MALLOC_PERTURB_": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", ENCODE], env=environment, capture_output=True, text=True)
    assert ended.stdout.strip() == hashlib.sha256(encode(clip)[1]).hexdigest(), ended.stderr


def test_image(tmp_path: Path) -> None:
    Image.fromarray(moving_square(1, height=100, width=150)[0]).save(tmp_path / "a.png")
    clip = read_image(tmp_path / "a.png", 50)
    assert [frame.shape for frame in clip.frames] == [(50, 76, 3)]
    media, content = encode(clip)
    assert media == "jpg" and content[:2] == b"\xff\xd8"
    (tmp_path / "b.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match="it cannot be read"):
        read_image(tmp_path / "b.png", 50)


def test_captions(tmp_path: Path) -> None:
    video = tmp_path / "A_red-car (1).mp4"
    assert told_of(video) == {"captions": {"name": "A red car 1"}}
    video.with_suffix(".txt").write_text("a red car\n turns left\n")
    assert told_of(video) == {"captions": {"text": "a red car turns left"}}
    table = video.with_suffix(".json")
    table.write_text(json.dumps({"caption": "one"}))
    assert told_of(video) == {"captions": {"text": "one"}}
    table.write_text(json.dumps({"captions": {"coca": "two", "llm": "three"}}))
    assert told_of(video) == {"captions": {"coca": "two", "llm": "three"}}
    table.write_text(json.dumps({"elevation": 10, "annotations": {"text_area": 0.05}}))
    assert told_of(video) == {
        "captions": {"text": "a red car turns left"},
        "elevation": 10.0,
        "annotations": {"text_area": 0.05},
    }


@pytest.mark.parametrize(
    "wrong",
    [
        "[]",
        "{}",
        "not json",
        '{"text": "a red car"}',
        '{"captions": {"coca": 3}}',
        '{"captions": "a red car"}',
        '{"elevation": "high"}',
        '{"elevation": 120}',
        '{"annotations": {"aesthetic": "good"}}',
    ],
)
def test_a_sidecar_of_another_kind_is_refused(tmp_path: Path, wrong: str) -> None:
    video = tmp_path / "a.mp4"
    video.with_suffix(".json").write_text(wrong)
    with pytest.raises(ValueError):
        told_of(video)


def test_keys_are_free() -> None:
    taken: set[str] = set()
    keys = [free_key(source, taken) for source in ("a b/c.mp4", "a b/c.mov", "a_b/c.mp4", "d.e.mp4")]
    assert keys == ["a_b_c", "a_b_c_2", "a_b_c_3", "d_e"]
