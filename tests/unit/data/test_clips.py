"""Choice, decoding, cropping and resizing of the frames of a clip."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from svd_ds.data.clips import (
    Box,
    ClipDraws,
    Timing,
    choose_captioner,
    read_frames,
    resize_crop,
)
from svd_ds.data.decoding import decode
from svd_ds.pixels.container import PADDING
from svd_ds.pixels.frame import to_rgb
from svd_ds.pixels.still import MAX_PIXELS
from tests.videos import counting, encode, moving_square


@given(
    stored=st.integers(1, 300),
    num_frames=st.integers(1, 25),
    fps=st.floats(1, 120),
    wanted=st.just(0.0) | st.floats(0.5, 60),
    draw=st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=200, deadline=None)
def test_timing_stays_inside_the_sample(
    stored: int, num_frames: int, fps: float, wanted: float, draw: float
) -> None:
    stored = max(stored, num_frames)
    timing = Timing.choose(stored, fps, num_frames, wanted, draw)
    frames = timing.frame_numbers(num_frames)
    assert len(frames) == num_frames and frames[0] >= 0 and frames[-1] < stored
    assert timing.fps * timing.stride == pytest.approx(fps)


def test_timing_is_nearest_to_the_wanted_rate() -> None:
    assert Timing.choose(100, 24.0, 8, 6.0, 0.0) == Timing(0, 4, 6.0)
    assert Timing.choose(100, 24.0, 8, 0.0, 0.0) == Timing(0, 1, 24.0)
    assert Timing.choose(100, 24.0, 8, 30.0, 0.0).stride == 1
    assert Timing.choose(15, 24.0, 8, 6.0, 0.0) == Timing(0, 2, 12.0), "too short for 6 a second"
    assert Timing.choose(100, 24.0, 8, 6.0, 0.9999).frame_numbers(8)[-1] == 99


def test_default_stream_is_preferred_to_larger_and_earlier_ones() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="matroska") as container:
        streams = [container.add_stream("ffv1", rate=24) for _ in range(2)]
        for stream, height in zip(streams, (24, 48), strict=True):
            stream.height, stream.width, stream.pix_fmt = height, 64, "yuv420p"
        streams[0].disposition, streams[1].disposition = 0, Disposition.default
        for stream in streams:
            for frame in counting(3, stream.height):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    (frame,) = decode(buffer.getvalue(), [1])
    assert frame.height == 48


@pytest.mark.parametrize("suffix", ["mp4", "matroska"])
@pytest.mark.parametrize("wanted", [range(40), range(0, 40, 7), range(9, 33, 5), range(39, 40)])
def test_decode_yields_the_wanted_frames(suffix: str, wanted: range) -> None:
    content = encode(counting(40), suffix=suffix)
    levels = [float(to_rgb(frame).float().mean()) for frame in decode(content, wanted)]
    assert levels == pytest.approx([4 * number + 8 for number in wanted], abs=1.5)


@pytest.mark.parametrize(
    ("suffix", "muxing", "options"),
    [
        ("mp4", {}, {"skip_frame": "all"}),
        # Neither header has the reordering delay of the frames: a frame would be lost.
        ("mp4", {"movflags": "frag_keyframe"}, {}),
        ("matroska", {}, {}),
    ],
)
def test_file_is_opened_without_decoding_only_if_its_header_has_the_delay(
    suffix: str, muxing: dict[str, str], options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encode(counting(24), suffix=suffix, muxing=muxing)
    opened, really_open = [], av.open
    monkeypatch.setattr(av, "open", lambda file, mode, options: opened.append(options) or really_open(file))
    levels = [float(to_rgb(frame).float().mean()) for frame in decode(content, range(24))]
    (given,) = opened
    assert {name: given[name] for name in given if name == "skip_frame"} == options
    assert given["max_pixels"] == str(MAX_PIXELS + PADDING)
    assert levels == pytest.approx([4 * number + 8 for number in range(24)], abs=1.5)


def test_decode_seeks_to_the_nearest_keyframe() -> None:
    content = encode(moving_square(64), keyframe_every=8)
    broken = bytearray(content)
    middle = content.index(b"mdat") + (len(content) - content.index(b"mdat")) // 4
    broken[middle : middle + 400] = bytes(400)
    clean = [to_rgb(frame) for frame in decode(content, range(56, 60))]
    assert all(
        torch.equal(to_rgb(frame), same)
        for frame, same in zip(decode(bytes(broken), range(56, 60)), clean, strict=True)
    )


def test_decode_errors_name_the_cause() -> None:
    content = encode(counting(10))
    with pytest.raises(ValueError, match="ends after 2 of 3 frames, before frame 10"):
        list(decode(content, [3, 9, 10]))
    for junk in (b"", b"text named mp4", content[: len(content) // 3]):
        with pytest.raises(ValueError, match="cannot be decoded"):
            list(decode(junk, [0]))


def test_image_is_a_clip_of_one_frame() -> None:
    pixels = np.full((40, 60, 3), (200, 60, 20), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    (frame,) = decode(buffer.getvalue(), [0])
    assert np.abs(to_rgb(frame).numpy().astype(int) - pixels).max() <= 3


@given(
    frame=st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    wanted=st.tuples(st.integers(8, 600), st.integers(8, 1100)),
    top=st.floats(0, 1, exclude_max=True),
    left=st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=200, deadline=None)
def test_box_is_the_largest_window_of_the_aspect_ratio(
    frame: tuple[int, int], wanted: tuple[int, int], top: float, left: float
) -> None:
    box = Box.largest(frame, wanted, top, left)
    assert box.top >= 0 and box.top + box.height <= frame[0] and 0 <= box.left <= frame[1] - box.width
    assert box.height == frame[0] or box.width == frame[1]
    assert abs(box.height * wanted[1] - box.width * wanted[0]) <= max(wanted)


def test_box_has_the_drawn_position() -> None:
    assert Box.largest((100, 300), (50, 50)) == Box(0, 100, 100, 100)
    assert Box.largest((100, 300), (50, 50), left=0.0) == Box(0, 0, 100, 100)
    assert Box.largest((300, 100), (50, 50), top=0.9999) == Box(200, 0, 100, 100)


def test_resize_is_antialiased_like_pillow() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 160, 3)).astype(np.uint8)
    frame = torch.from_numpy(pixels)
    ours = resize_crop(frame, Box(10, 20, 64, 96), 16, 24)
    theirs = Image.fromarray(pixels[10:74, 20:116]).resize((24, 16), Image.Resampling.BICUBIC)
    assert np.abs(ours.numpy().astype(int) - np.asarray(theirs).astype(int)).max() <= 1
    assert torch.equal(resize_crop(frame, Box(10, 20, 64, 96), 16, 24, flip=True), ours.flip(1))


def test_read_frames_equals_a_plain_loop_of_crop_and_resize() -> None:
    content = encode(moving_square(24, height=96, width=160))
    with av.open(io.BytesIO(content)) as container:
        plain = [frame.to_image() for frame in container.decode(video=0)]
    wanted = range(5, 23, 4)
    frames_TCHW = read_frames(content, wanted, (32, 40), top=0.5, left=0.99)
    for number, frame_CHW in zip(wanted, frames_TCHW, strict=True):
        theirs = np.asarray(plain[number].crop((40, 0, 160, 96)).resize((40, 32), Image.Resampling.BICUBIC))
        assert np.abs(frame_CHW.permute(1, 2, 0).numpy().astype(int) - theirs.astype(int)).max() <= 1
    mirrored = read_frames(content, wanted, (32, 40), top=0.5, left=0.99, flip=True)
    assert mirrored.equal(frames_TCHW.flip(-1))
    for frames in (frames_TCHW, mirrored, torch.stack([frames_TCHW, mirrored])[1]):
        assert frames.is_contiguous(memory_format=torch.channels_last), "no copy in another format"


def test_captioners_are_drawn_by_weight() -> None:
    captions = {"coca": "a", "vblip": "b", "llm": "c"}
    weights = {"coca": 0.5, "vblip": 0.25, "llm": 0.25}
    draws = [(n + 0.5) / 1000 for n in range(1000)]
    drawn = [choose_captioner(captions, weights, draw) for draw in draws]
    assert [drawn.count(name) for name in captions] == [500, 250, 250]
    only_two = [choose_captioner({"coca": "a", "llm": "c"}, weights, draw) for draw in draws]
    assert only_two.count("coca") == pytest.approx(667, abs=1)
    assert {choose_captioner(captions, {}, draw) for draw in draws} == set(captions)
    others = [choose_captioner({"name": "x", "title": "y"}, weights, draw) for draw in draws]
    assert others.count("name") == pytest.approx(500, abs=1)
    assert {choose_captioner({"coca": "a", "name": "x"}, weights, draw) for draw in draws} == {"coca"}
    with pytest.raises(ValueError, match=r"captions \(llm\) have no weight"):
        choose_captioner({"llm": "x"}, {"coca": 1.0, "llm": 0.0}, 0.5)


def test_draws_depend_on_seed_and_ordinal_only() -> None:
    assert ClipDraws.draw(3, 7) == ClipDraws.draw(3, 7)
    assert len({ClipDraws.draw(seed, ordinal) for seed in range(10) for ordinal in range(10)}) == 100
    starts = [ClipDraws.draw(0, ordinal).start for ordinal in range(2000)]
    assert np.mean(starts) == pytest.approx(0.5, abs=0.03)
