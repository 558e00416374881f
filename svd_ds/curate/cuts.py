"""Second stage: shots, found by a cascade of PySceneDetect's detectors at several frame rates.

arXiv 2311.15127 section 3.1 runs three detectors at different rates and thresholds, to catch hard cuts and
slow fades; which ones is not published. Ours: at the full rate the adaptive detector for hard cuts and the
threshold detector for fades through black; at low rates the content detector, for which a cross-fade is
sudden. It takes fast motion for one too, so each of its finds is looked at again, at the full rate: in the
middle of a cross-fade a frame is the mean of the frames before and after it, and among moving things it is
not.

A cut is a span of frames that belong to no shot: empty for a hard cut, the whole of a fade.
Shape legend: T frames, H x W = 9 x 16 pixels of thumbnails, C = 3 colours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest

import cv2
import numpy as np
import pyarrow as pa
from scenedetect import FrameTimecode
from scenedetect.detector import SceneDetector
from scenedetect.detectors import AdaptiveDetector, ContentDetector, ThresholdDetector

from svd_ds.curate.frames import read_frames
from svd_ds.curate.raw import RawFile
from svd_ds.curate.stages import Place
from svd_ds.curate.table import Known, Row

COLUMNS = {"begin": pa.int64(), "end": pa.int64(), "ended_by": pa.string()}
VIEW = (128, 72)
"""Width and height at which the detectors see frames."""
THUMBNAIL = (16, 9)
"""Width and height at which every frame of the video is kept, to look at finds again."""
SLOW_LEVEL = 15.0
"""Levels by which a slow detector's frames differ for a find that is worth another look."""
FADE_MARGIN = Fraction(1, 4)
"""Seconds before and after what is known to be a fade that belong to it too."""
REPEAT = 0.7
"""Levels by which an encoded copy of a frame may differ from it; what moves differs by 2 and more."""
HELD = Fraction(1, 2)
"""Seconds from which on a picture that repeats is a still, and not a lower rate shown at a higher one."""
JUMPS = 3
"""Other changes near a find, as large as it, that make it one jump of a low rate and no cut ..."""
JUMP_RATIO = 2.0
"""... as large: the find is less than so many times each of them."""
CERTAIN = 40.0
"""Levels by which thumbnails differ across a change that is a cut whatever is near: in a montage all are."""
FLASH = 3
"""Distinct frames that a flash lasts at most: the picture after it is the one before it, so it is no cut."""


@dataclass(frozen=True)
class CutSettings:
    """Thresholds of the cascade; levels are of 255."""

    hard_ratio: float = 3.0
    """Times that a hard cut changes the frame more than the frames around it change ..."""
    hard_level: float = 15.0
    """... and by so many levels at least."""
    black: float = 12.0
    """Mean brightness below which the picture is faded out."""
    slow: tuple[tuple[float, float], ...] = ((2.0, 20.0), (1.0, 30.0), (0.5, 45.0))
    """Rates, in frames a second, at which cross-fades are looked for; and levels by which thumbnails half
    such a frame before and after a fade's middle differ."""
    blend: float = 0.4
    """How far the thumbnail in the middle may be from the mean of those two, as a share of that
    difference."""


@dataclass(frozen=True)
class Cut:
    """Frames `begin` to `end`, exclusive, belong to neither the shot before nor the one after."""

    begin: int
    end: int
    kind: str
    """What made it: hard, black or fade."""


def find_shots(settings: CutSettings, file: RawFile, known: Known, place: Place) -> Iterator[Row]:
    """The shots of a video in order, and what ended each: a kind of cut, or "end".

    Raises ValueError, after the shots before it, where the video cannot be decoded from some frame on, or
    where there are none.
    """
    (about,) = known["probe"]
    if about["kind"] == "image":
        yield {"begin": 0, "end": 1, "ended_by": "end"}
        return
    rate = Fraction(about["rate"])
    cascade = Cascade(settings, rate)
    broken = None
    try:
        for number, frame in read_frames(file.path, rate, about["promised"]):
            cascade.see(number, frame.reformat(*VIEW, format="bgr24", threads=1).to_ndarray())
    except ValueError as error:
        broken = error
    cuts = [*cascade.cuts(), Cut(cascade.num_frames, cascade.num_frames, "end")]
    begins = [0, *(cut.end for cut in cuts)]
    shots = [(begin, cut) for begin, cut in zip(begins, cuts, strict=False) if begin < cut.begin]
    for begin, cut in shots:
        yield {"begin": begin, "end": cut.begin, "ended_by": cut.kind}
    if broken is not None:
        raise broken
    if not shots:
        raise ValueError("it is black or fading throughout")


class Cascade:
    """All detectors over one video: `see` every frame, then ask for the `cuts`."""

    def __init__(self, settings: CutSettings, rate: Fraction) -> None:
        self.num_frames = 0
        self._settings = settings
        self._rate = rate
        self._thumbnails: list[np.ndarray] = []
        self._last_distinct: np.ndarray | None = None
        self._last_change = 0
        self._distinct: list[int] = []
        """Numbers of the frames that the detector of hard cuts sees."""
        adaptive = AdaptiveDetector(settings.hard_ratio, 0, min_content_val=settings.hard_level)
        self._hard = Sampled(adaptive, 1, rate)
        # The threshold detector tells one frame of each fade: biased, it tells the first and the last.
        self._out = Sampled(ThresholdDetector(settings.black, 0, -1.0, add_final_scene=True), 1, rate)
        self._in = Sampled(ThresholdDetector(settings.black, 0, 1.0), 1, rate)
        steps = [max(1, round(rate / Fraction(slow_rate))) for slow_rate, _ in settings.slow]
        self._slow = [Sampled(ContentDetector(SLOW_LEVEL, 0), step, rate) for step in steps]

    def see(self, number: int, view_HWC: np.ndarray) -> None:
        """The next frame, BGR."""
        self.num_frames = number + 1
        self._thumbnails.append(cv2.resize(view_HWC, THUMBNAIL, interpolation=cv2.INTER_AREA))
        for detector in (self._out, self._in, *self._slow):
            detector.see(number, view_HWC)
        if self._is_distinct(number, view_HWC):
            self._hard.see(len(self._distinct), view_HWC)
            self._distinct.append(number)

    def _is_distinct(self, number: int, view_HWC: np.ndarray) -> bool:
        """Whether a frame shows anything new, or a picture has been still for long.

        Film at 10 frames a second shown at 30, animation on twos and threes, and a variable rate that is
        filled up repeat frames. Copies do not change, so that every new picture would look like a cut.
        """
        last = self._last_distinct
        if last is None or np.abs(view_HWC - last).mean() > REPEAT:
            self._last_distinct = view_HWC.astype(np.float32)
            self._last_change = number
            return True
        return number - self._last_change > HELD * self._rate

    def cuts(self) -> list[Cut]:
        """In order, none touching another."""
        if not self.num_frames:
            return []
        thumbnails_THWC = np.stack(self._thumbnails)
        distinct_THWC = thumbnails_THWC[self._distinct]
        found = self._hard.finish(len(self._distinct))
        hard = [self._distinct[at] for at in found if not _is_flash(distinct_THWC, at)]
        changes = np.abs(np.diff(thumbnails_THWC.astype(np.int16), axis=0)).mean((1, 2, 3))
        hard = [at for at in hard if not is_judder(changes, at - 1, round(HELD * self._rate))]
        out, back = self._out.finish(self.num_frames), self._in.finish(self.num_frames)
        cuts = [Cut(at, at, "hard") for at in hard]
        cuts += [Cut(begin, end, "black") for begin, end in zip_longest(out, back, fillvalue=self.num_frames)]
        margin = round(FADE_MARGIN * self._rate)
        for detector, (_, level) in zip(self._slow, self._settings.slow, strict=True):
            for number in detector.finish(self.num_frames):
                near = range(max(0, number - detector.step), min(self.num_frames, number + detector.step))
                inside = blends(
                    thumbnails_THWC, near, max(1, detector.step // 2), level, self._settings.blend
                )
                if inside:
                    begin, end = inside[0] - margin, inside[-1] + 1 + margin
                    cuts.append(Cut(max(0, begin), min(self.num_frames, end), "fade"))
        return _merged(cuts)


class Sampled:
    """A detector that sees every `step`-th frame."""

    def __init__(self, detector: SceneDetector, step: int, rate: Fraction) -> None:
        self.step = step
        self._detector = detector
        self._rate = rate / step
        self._found: list[int] = []

    def see(self, number: int, view_HWC: np.ndarray) -> None:
        if number % self.step == 0:
            time = FrameTimecode(number // self.step, self._rate)
            self._found += [cut.frame_num * self.step for cut in self._detector.process_frame(time, view_HWC)]

    def finish(self, num_frames: int) -> list[int]:
        """The first frames of what it takes for new shots."""
        last = FrameTimecode((num_frames - 1) // self.step, self._rate)
        return self._found + [cut.frame_num * self.step for cut in self._detector.post_process(last)]


def blends(frames_THWC: np.ndarray, near: range, half: int, level: float, most: float) -> list[int]:
    """Frames of `near` that lie inside a cross-fade, judged by the frames `half` before and after each.

    Those two differ by `level`, and what lies between is their mean but for a share of `most` of it.
    """
    inside = []
    for number in range(max(half, near.start), min(len(frames_THWC) - half, near.stop)):
        before, middle, after = frames_THWC[number - half : number + half + 1 : half].astype(np.float32)
        change = np.abs(after - before).mean()
        if change >= level and np.abs(middle - (before + after) / 2).mean() <= most * change:
            inside.append(number)
    return inside


def is_judder(changes: np.ndarray, at: int, near: int) -> bool:
    """Does the picture jump as much elsewhere, within `near` frames of change number `at`, again and again?

    A low rate shown at a higher one jumps so. Its copies are no exact ones where the encoding is coarse or
    grain was added after them: then they are distinct, and every jump is far above the changes around it.
    """
    others = np.concatenate([changes[max(0, at - near) : at], changes[at + 1 : at + 1 + near]])
    if len(others) < JUMPS or changes[at] >= CERTAIN:
        return False
    return bool(changes[at] < JUMP_RATIO * np.sort(others)[-JUMPS])


def _is_flash(frames_THWC: np.ndarray, at: int) -> bool:
    """Is what precedes a change back soon after it?"""
    last = len(frames_THWC) - 1
    numbers = (max(0, at - FLASH), min(last, at + FLASH - 1), at - 1, at)
    before, after, left, entered = frames_THWC[list(numbers)].astype(np.float32)
    return bool(np.abs(after - before).mean() < np.abs(entered - left).mean() / 2)


def _merged(cuts: Sequence[Cut]) -> list[Cut]:
    """Cuts that touch become one, of the kind of the longest."""
    merged: list[Cut] = []
    for cut in sorted(cuts, key=lambda cut: (cut.begin, cut.end)):
        if merged and cut.begin <= merged[-1].end:
            last = merged.pop()
            kind = max(last, cut, key=lambda part: part.end - part.begin).kind
            cut = Cut(last.begin, max(last.end, cut.end), kind)
        merged.append(cut)
    return merged
