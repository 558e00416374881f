"""Frames are numbered as they are shown, independently of the container's header."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from svd_ds.data import external_shards
from svd_ds.data.decoding import decode, open_video
from svd_ds.data.external_shards import measure_media
from svd_ds.data.timeline import fit_clock, read_timeline
from svd_ds.pixels.frame import to_rgb
from tests.videos import counting, encode, hide


def levels(content: bytes, wanted: Sequence[int]) -> list[int]:
    """Decode frames of `counting` and return their numbers."""
    return [round((float(to_rgb(frame).float().mean()) - 8) / 4) for frame in decode(content, wanted)]


def timed(times: Sequence[int], suffix: str = "mp4", codec: str = "libx264", frames: int = 2) -> bytes:
    """Encode `counting` with these times in milliseconds; `frames` is the number of consecutive B-frames."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format=suffix) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        stream.options = {"g": "8", "bf": str(frames), "crf": "12"}
        for time, pixels in zip(times, counting(len(times)), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize(("first", "num_frames"), [(0, 40), (11, 29), (0, 23), (5, 20), (16, 24)])
def test_frames_hidden_by_an_edit_list_have_no_number(suffix: str, first: int, num_frames: int) -> None:
    content = hide(encode(counting(40), suffix=suffix), first, num_frames)
    assert measure_media(content, False)[:2] == (num_frames, 24.0)
    shown = list(range(first, first + num_frames))
    assert levels(content, range(num_frames)) == shown
    assert levels(content, [num_frames - 7, num_frames - 1]) == [shown[-7], shown[-1]]


@pytest.mark.parametrize(
    ("codec", "pixels", "b_frames"),
    [("libx264", "yuv420p", 0), ("libx264", "yuv420p", 2), ("mpeg4", "yuv420p", 2), ("mjpeg", "yuvj420p", 0)],
)
def test_every_frame_of_an_avi_is_numbered(codec: str, pixels: str, b_frames: int) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="avi") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 64, pixels
        stream.options = {"g": "8", "bf": str(b_frames), "b": "4M", "qmax": "3"}
        for frame in counting(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    content = buffer.getvalue()
    assert measure_media(content, False) == (40, 25.0, 32, 64)
    assert levels(content, range(40)) == list(range(40))
    assert levels(content, [3, 17, 39]) == [3, 17, 39]


EVEN = [40 * number for number in range(40)]


@pytest.mark.parametrize("suffix", ["mp4", "matroska"])
@pytest.mark.parametrize(
    "times",
    [
        EVEN,
        [time + 3000 for time in EVEN],
        [time + 13 * (number % 3) for number, time in enumerate(EVEN)],
        [*EVEN[:-1], EVEN[-1] + 40],
        [round(number * 1000 / 24) for number in range(40)],
    ],
    ids=["even", "late start", "jitter", "a hole", "rounded times"],
)
def test_frames_with_jittered_times_are_numbered_one_by_one(suffix: str, times: list[int]) -> None:
    content = timed(times, suffix)
    num_frames, fps, *_ = measure_media(content, False)
    assert num_frames == 40 and fps == pytest.approx(39_000 / (times[-1] - times[0]), rel=0.03)
    assert levels(content, range(40)) == list(range(40))
    for start in range(40):
        assert levels(content, [start]) == [start], "a seek finds the frame"


@pytest.mark.parametrize("suffix", ["mp4", "matroska"])
@pytest.mark.parametrize("held", [10, 39], ids=["middle", "last"])
def test_held_frame_repeats_its_number(suffix: str, held: int) -> None:
    times = [time + (400 if number > held else 0) for number, time in enumerate(EVEN)]
    content = timed(times, suffix)
    num_frames, fps, *_ = measure_media(content, False)
    repeats = 10 if held < 39 else 0
    shown = [number for number in range(40) for _ in range(repeats + 1 if number == held else 1)]
    assert num_frames == 40 + repeats and fps == pytest.approx(25)
    assert levels(content, range(num_frames)) == shown


def test_long_last_frame_is_not_truncation() -> None:
    content = encode(counting(40))
    with av.open(io.BytesIO(content)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        buffer = io.BytesIO()
        with av.open(buffer, mode="w", format="mp4") as copy:
            stream = copy.add_stream_from_template(container.streams.video[0])
            latest = max(packets, key=lambda packet: packet.pts)
            latest.duration *= 60
            for packet in packets:
                packet.stream = stream
                copy.mux(packet)
    num_frames, fps, *_ = measure_media(buffer.getvalue(), False)
    assert num_frames == 40 and fps == pytest.approx(24)
    assert levels(buffer.getvalue(), range(40)) == list(range(40))


def test_fragmented_file_is_numbered_like_a_plain_one() -> None:
    content = encode(counting(40), muxing={"movflags": "frag_keyframe+empty_moov"})
    assert measure_media(content, False)[:2] == (40, 24.0)
    for start in range(40):
        assert levels(content, range(start, 40)) == list(range(start, 40))


@pytest.mark.parametrize("suffix", ["mp4", "matroska"])
def test_seek_in_open_gops_finds_the_frame(suffix: str) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format=suffix) as container:
        stream = container.add_stream("libx264", rate=24)
        stream.options = {"x264-params": "open-gop=1:keyint=8:min-keyint=8:bframes=3:scenecut=0", "crf": "12"}
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        for pixels in counting(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    for start in range(38):
        assert levels(buffer.getvalue(), range(start, start + 3)) == [start, start + 1, start + 2]


def test_hidden_frames_of_vp8_have_no_number() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="webm") as container:
        stream = container.add_stream("libvpx", rate=24)
        stream.options = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "b": "1M"}
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        for pixels in counting(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    assert measure_media(buffer.getvalue(), False)[0] == 40
    assert levels(buffer.getvalue(), range(40)) == list(range(40))


def test_file_shorter_than_its_own_index_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), mode="w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        for pixels in counting(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    content = (tmp_path / "a.mp4").read_bytes()
    assert measure_media(content, False)[0] == 40
    with pytest.raises(ValueError, match=r"it is cut short: it has \d+ bytes, and its frames end at byte"):
        measure_media(content[:-100], False)


def test_broken_times_are_refused() -> None:
    with pytest.raises(ValueError, match="its clock jumps by 99 s after frame 1"):
        fit_clock([0.0, 0.1, 99.1], [25.0])


def test_change_of_frame_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [av.VideoFrame(64, 32, "rgb24"), av.VideoFrame(32, 64, "rgb24")]
    monkeypatch.setattr(external_shards, "decode", lambda *_: iter(frames))
    with pytest.raises(ValueError, match="its frames change from 64x32 to 32x64"):
        measure_media(encode(counting(8)), False)


def test_timeline_has_the_frames_and_keyframes_of_a_video() -> None:
    with open_video(encode(counting(16))) as (container, stream):
        timeline = read_timeline(container, stream)
    assert timeline is not None and len(timeline.times) == 16 and timeline.rate == 24
    assert [time for time, _ in timeline.keyframes] == [timeline.times[0], timeline.times[8]]
    assert np.all(np.diff(timeline.times) > 0)
