"""Cuts of videos joined from real shots at known frames: every cut is found, and no other."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from svd_ds.curate.clips import ClipCutSettings
from svd_ds.curate.cuts import DETECTOR_SIZE, Cascade, Cut, CutSettings
from svd_ds.data.decoding import decode
from svd_ds.pixels.frame import to_rgb
from tests.curation import cross_fade, fade_through_black, real_shots, run_stages
from tests.videos import encode, write_video

SHOT_PAIRS = [
    ("rabbit", "man"),
    ("man", "street3"),
    ("street2", "rabbit"),
    ("street3", "street4"),
    ("street1", "street2"),
]
"""Pairs of calm shots, a calm shot and traffic, and shots of traffic."""
MAX_FRAMES = 70
"""Number of frames of each shot that are used."""


def find_cuts(frames_THWC: np.ndarray, rate: int = 25) -> list[Cut]:
    cascade = Cascade(CutSettings(), Fraction(rate))
    for number, frame in enumerate(frames_THWC):
        cascade.add_frame(number, cv2.resize(frame, DETECTOR_SIZE, interpolation=cv2.INTER_AREA)[..., ::-1])
    return cascade.cuts()


@pytest.mark.parametrize("name", ["rabbit", "man", *(f"street{i}" for i in range(5))])
def test_shots_without_cuts_have_none(name: str) -> None:
    assert find_cuts(real_shots()[name]) == []


@pytest.mark.parametrize("names", SHOT_PAIRS, ids="-".join)
def test_hard_cut_is_found(names: tuple[str, str]) -> None:
    first, second = (real_shots()[name][:MAX_FRAMES] for name in names)
    (cut,) = find_cuts(np.concatenate([first, second]))
    assert cut.kind == "hard" and abs(cut.begin - len(first)) <= 2 and cut.end == cut.begin


@pytest.mark.parametrize("names", SHOT_PAIRS, ids="-".join)
def test_cross_fade_of_a_second_is_found(names: tuple[str, str]) -> None:
    first, second = (real_shots()[name][:MAX_FRAMES] for name in names)
    fade = range(len(first) - 25, len(first))
    (cut,) = find_cuts(cross_fade(first, second))
    assert cut.kind == "fade" and (cut.begin + cut.end) // 2 in fade
    # The shots keep few frames of the fade.
    assert cut.begin < fade.start + 12 and cut.end > fade.stop - 12 and cut.end - cut.begin < 45


@pytest.mark.parametrize("names", SHOT_PAIRS, ids="-".join)
def test_fade_through_black_is_found(names: tuple[str, str]) -> None:
    first, second = (real_shots()[name][:MAX_FRAMES] for name in names)
    fade = range(len(first) - 12, len(first) + 12)
    (cut,) = find_cuts(fade_through_black(first, second))
    assert (cut.begin + cut.end) // 2 in fade and cut.begin < len(first) < cut.end


def test_two_cuts_in_half_a_second_are_found() -> None:
    shots = real_shots()
    joined = np.concatenate([shots["rabbit"][:40], shots["street3"][:12], shots["man"][:40]])
    assert [(cut.begin, cut.kind) for cut in find_cuts(joined)] == [(40, "hard"), (52, "hard")]


def test_flash_is_no_cut_and_black_ends_are_cut_off() -> None:
    frames = real_shots()["man"].copy()
    frames[60] = 255
    assert find_cuts(frames) == []
    black = np.zeros_like(frames[:10])
    assert [(cut.begin, cut.end) for cut in find_cuts(np.concatenate([black, frames, black]))] == [
        (0, 10),
        (130, 140),
    ]


def test_video_without_shots_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", np.zeros((30, 48, 64, 3), np.uint8), fps=25)
    results, _ = run_stages(path, ClipCutSettings("1s", "20s"), tmp_path / "out")
    assert results["cuts"] == [{"error": "it is black or fading throughout"}]


def test_shots_record_the_kind_of_cut_that_ended_them(tmp_path: Path) -> None:
    shots = real_shots()
    frames = np.concatenate([cross_fade(shots["rabbit"][:60], shots["man"][:60]), shots["street3"]])
    path = write_video(tmp_path / "a.mp4", frames, fps=25)
    results, clips = run_stages(path, ClipCutSettings("1s", "20s"), tmp_path / "out")
    first, second, third = results["cuts"]
    assert [shot["ended_by"] for shot in results["cuts"]] == ["fade", "hard", "end"]
    assert 25 < first["end"] < 45 < second["begin"] < 70 and second["end"] == third["begin"] == 95
    assert third["end"] == len(frames) and len(clips) == 3


@pytest.mark.parametrize("times", [(2,), (3,), (5,), (3, 2), (2, 3, 2, 2, 3)], ids=str)
@pytest.mark.parametrize("names", [SHOT_PAIRS[0], SHOT_PAIRS[3]], ids="-".join)
def test_repeated_frames_are_no_cuts(names: tuple[str, str], times: tuple[int, ...]) -> None:
    """A low rate shown at a higher one, animation on twos, threes and fives, and pulldown."""
    shots = [real_shots()[name][:MAX_FRAMES] for name in names]
    frames = np.concatenate(shots)
    counts = np.resize(times, len(frames))
    (cut,) = find_cuts(np.repeat(frames, counts, axis=0), rate=round(25 * counts.mean()))
    assert abs(cut.begin - counts[: len(shots[0])].sum()) <= 2 * max(times)


@pytest.mark.parametrize(
    ("names", "step", "times"),
    [(("man", "street4"), 5, (5,)), (("man", "street4"), 3, (3,)), (("street1", "street2"), 2, (1, 4))],
    ids=str,
)
def test_inexact_repeats_are_no_cuts(names: tuple[str, str], step: int, times: tuple[int, ...]) -> None:
    """Low rates shown at higher ones, with grain that was added afterwards."""
    first, second = (real_shots()[name][:60:step] for name in names)
    counts = np.resize(times, len(first) + len(second))
    frames = np.repeat(np.concatenate([first, second]), counts, axis=0)
    rate = round(25 / step * counts.mean())
    frames = np.clip(frames + np.random.default_rng(0).normal(0, 8, frames.shape), 0, 255).astype(np.uint8)
    content = encode(frames, rate, options={"crf": "20", "g": "250"})
    frames = np.stack([to_rgb(frame).numpy() for frame in decode(content, range(len(frames)))])
    (cut,) = (cut for cut in find_cuts(frames, rate) if cut.kind == "hard")
    assert cut.begin == counts[: len(first)].sum()


def test_montage_of_short_shots_is_cut_everywhere() -> None:
    names = ("street1", "man", "rabbit", "street3", "street0")
    shots = [real_shots()[name][begin : begin + 4] for begin in (0, 8, 16) for name in names]
    assert [cut.begin for cut in find_cuts(np.concatenate(shots))] == list(range(4, 60, 4))


def test_pictures_of_a_slide_show_are_shots() -> None:
    slides = [real_shots()[name][0] for name in ("rabbit", "man", "street1", "street3")]
    cuts = find_cuts(np.repeat(np.stack(slides), 50, axis=0))
    assert [cut.begin for cut in cuts] == [50, 100, 150]
