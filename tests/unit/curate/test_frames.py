"""Frames of raw videos are numbered in display order, and read until the video changes its size."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import pytest

from svd_ds.curate.clips import ClipCutSettings, plan_windows
from svd_ds.curate.frames import read_frames
from svd_ds.curate.probe import probe_video
from svd_ds.data.decoding import select_video_stream
from svd_ds.pixels.frame import to_rgb
from tests.curation import run_stages
from tests.videos import counting, encode, hide, moving_square


def shown_frames(path: Path) -> list[int]:
    """Numbers that the frames of a video of `counting` show, in display order."""
    probed = probe_video(path)
    frames = list(read_frames(path, Fraction(probed["rate"]), probed["declared_frames"]))
    assert [number for number, _ in frames] == list(range(len(frames)))
    return [round((float(to_rgb(frame).float().mean()) - 8) / 4) for _, frame in frames]


def avi(b_frames: int, codec: str = "libx264") -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="avi") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        stream.options = {"g": "8", "bf": str(b_frames), "crf": "12", "b": "4M"}
        for frame in counting(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("times", [2, 3])
def test_frames_after_a_restart_of_the_clock_are_kept(tmp_path: Path, times: int) -> None:
    path = tmp_path / "joined.ts"
    path.write_bytes(encode(counting(40), fps=25, suffix="mpegts") * times)
    assert shown_frames(path) == list(range(40)) * times
    probed = probe_video(path)
    assert probed["num_frames"] == 40 * times and not probed["constant_rate"]


@pytest.mark.parametrize(("b_frames", "codec"), [(0, "libx264"), (2, "libx264"), (2, "mpeg4")])
def test_every_frame_of_an_avi_is_read_once(tmp_path: Path, b_frames: int, codec: str) -> None:
    path = tmp_path / "a.avi"
    path.write_bytes(avi(b_frames, codec))
    assert shown_frames(path) == list(range(40))


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize(("first", "num_frames"), [(11, 29), (0, 23), (5, 20)])
def test_frames_hidden_by_an_edit_list_are_neither_counted_nor_copied(
    tmp_path: Path, suffix: str, first: int, num_frames: int
) -> None:
    path = tmp_path / f"trimmed.{suffix}"
    path.write_bytes(hide(encode(counting(40), suffix=suffix), first, num_frames))
    probed = probe_video(path)
    assert probed["declared_frames"] == num_frames
    assert shown_frames(path) == list(range(first, first + num_frames))
    # A copy would lack hidden frames on which others depend.
    windows = plan_windows([(0, num_frames)], probed, ClipCutSettings(shortest="8", longest="16"))
    assert windows and not any(window.copied for window in windows)


@pytest.mark.parametrize("size", [(64, 128), (16, 32), (64, 32)], ids=["double", "half", "turned"])
def test_change_of_frame_size_ends_the_last_shot_and_is_reported(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    path = tmp_path / "call.ts"
    parts = (moving_square(40, 32, 64), moving_square(40, *size))
    path.write_bytes(b"".join(encode(part, fps=25, suffix="mpegts") for part in parts))
    with pytest.raises(ValueError, match=rf"change from 64x32 to {size[1]}x{size[0]} pixels at frame 40"):
        list(read_frames(path, Fraction(25)))
    results, rows = run_stages(path, ClipCutSettings(shortest="8", longest="16"), tmp_path / "out")
    *shots, end = results["cuts"]
    assert shots[-1]["end"] == 40 and "change from 64x32" in end["error"]
    cut = [row for row in rows if "media" in row]
    assert cut, rows
    for row in cut:
        with av.open(str(tmp_path / "out" / row["media"])) as container:
            assert {(frame.height, frame.width) for frame in container.decode(video=0)} == {(32, 64)}
        assert (row["height"], row["width"]) == (32, 64)


def test_larger_of_two_streams_is_read() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="matroska") as container:
        streams = [container.add_stream("libx264", rate=25) for _ in range(2)]
        for stream, (height, width) in zip(streams, [(16, 32), (32, 64)], strict=True):
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for stream in streams:
            for frame in counting(4, stream.height, stream.width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer) as container:
        defaults = [bool(stream.disposition & 1) for stream in container.streams.video]
        expected = 64 if defaults[0] == defaults[1] else 32
        assert select_video_stream(container).width == expected


def test_slow_slide_show_is_refused_with_a_reason() -> None:
    probed = {"rate": "1/12", "height": 32, "width": 64, "codec": "h264", "num_frames": 5}
    with pytest.raises(
        ValueError, match=r"at its 0\.0833 frames a second a clip of 2s to 20s has 0 to 2 frames"
    ):
        plan_windows([(0, 5)], probed, ClipCutSettings())
