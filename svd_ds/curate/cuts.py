"""Stage 2: shot boundaries, found by a cascade of PySceneDetect's detectors at several frame rates.

arXiv 2311.15127, section 3.1, runs three detectors at different rates and thresholds, to catch hard cuts and
slow fades; the detectors and thresholds are not published. This cascade runs, at the full rate, the adaptive
detector for hard cuts and the threshold detector for fades through black; at low rates the content detector,
to which a cross-fade looks like a hard cut. The content detector also reacts to fast motion, so each of its
proposals is verified at the full rate: in the middle of a cross-fade a frame is the mean of the frames before
and after it, which is not so for moving objects.

A cut is a span of frames that belong to no shot: empty for a hard cut, all frames of a fade.

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
from svd_ds.curate.stages import StageContext
from svd_ds.curate.table import Row, RowsByStage

COLUMNS = {"begin": pa.int64(), "end": pa.int64(), "ended_by": pa.string()}
DETECTOR_SIZE = (128, 72)
"""Width and height of the frames that the detectors see."""
THUMBNAIL_SIZE = (16, 9)
"""Width and height of the thumbnails that are kept of every frame, to verify proposals."""
PROPOSAL_LEVEL = 15.0
"""Threshold of the content detector at low rates, of 255: a larger change is verified."""
FADE_MARGIN = Fraction(1, 4)
"""Seconds before and after the verified frames of a fade that also count as fade."""
REPEAT_LEVEL = 0.7
"""Maximum difference of an encoded copy of a frame, of 255; motion differs by 2 or more."""
STILL_SECONDS = Fraction(1, 2)
"""Duration after which repeated frames count as a still picture, and not as a low frame rate stored at a
higher one."""
MIN_JUMPS = 3
"""Number of other changes close to a hard cut and of similar size that mark it as judder of a low frame
rate."""
JUMP_RATIO = 2.0
"""Ratio of a change to another below which the two are of similar size."""
CERTAIN_LEVEL = 40.0
"""Difference of thumbnails, of 255, that is always a cut: in a montage all changes are large."""
MAX_FLASH_FRAMES = 3
"""Maximum length of a flash in distinct frames: the picture after it is the one before it, so it is not a
cut."""


@dataclass(frozen=True)
class CutSettings:
    """Thresholds of the cascade; levels are of 255."""

    hard_ratio: float = 3.0
    """Minimum ratio of the change at a hard cut to the mean change around it."""
    hard_level: float = 15.0
    """Minimum change at a hard cut."""
    black_level: float = 12.0
    """Mean brightness below which a frame is black."""
    fade_rates: tuple[tuple[float, float], ...] = ((2.0, 20.0), (1.0, 30.0), (0.5, 45.0))
    """(rate, level) of each low-rate detector of cross-fades: frames a second, and the minimum difference
    of the thumbnails half a low-rate frame before and after the middle of a fade."""
    max_blend_error: float = 0.4
    """Maximum distance of the middle thumbnail from the mean of those two, as a fraction of their
    difference."""


@dataclass(frozen=True)
class Cut:
    """A cut: frames `begin` to `end`, exclusive, belong neither to the shot before nor to the shot after."""

    begin: int
    end: int
    kind: str
    """Kind of cut: hard, black or fade; "end" for the end of the video."""


def find_shots(
    settings: CutSettings, file: RawFile, inputs: RowsByStage, context: StageContext
) -> Iterator[Row]:
    """Yield the shots of a video in order, and the kind of cut that ended each.

    Raises:
        ValueError: the video cannot be decoded from some frame on (raised after the shots before it), or it
            has no shots.
    """
    (probed,) = inputs["probe"]
    if probed["kind"] == "image":
        yield {"begin": 0, "end": 1, "ended_by": "end"}
        return
    rate = Fraction(probed["rate"])
    cascade = Cascade(settings, rate)
    failure = None
    try:
        for number, frame in read_frames(file.path, rate, probed["declared_frames"]):
            cascade.add_frame(number, frame.reformat(*DETECTOR_SIZE, format="bgr24", threads=1).to_ndarray())
    except ValueError as error:
        failure = error
    cuts = [*cascade.cuts(), Cut(cascade.num_frames, cascade.num_frames, "end")]
    begins = [0, *(cut.end for cut in cuts)]
    shots = [(begin, cut) for begin, cut in zip(begins, cuts, strict=False) if begin < cut.begin]
    for begin, cut in shots:
        yield {"begin": begin, "end": cut.begin, "ended_by": cut.kind}
    if failure is not None:
        raise failure
    if not shots:
        raise ValueError("it is black or fading throughout")


class Cascade:
    """All detectors over one video: call `add_frame` for every frame, then `cuts`."""

    def __init__(self, settings: CutSettings, rate: Fraction) -> None:
        self.num_frames = 0
        self._settings = settings
        self._rate = rate
        self._thumbnails: list[np.ndarray] = []
        self._last_distinct: np.ndarray | None = None
        self._last_change = 0
        # Numbers of the frames that the hard-cut detector sees.
        self._distinct: list[int] = []
        adaptive = AdaptiveDetector(settings.hard_ratio, 0, min_content_val=settings.hard_level)
        self._hard = SubsampledDetector(adaptive, 1, rate)
        # The threshold detector reports one frame of each fade; its bias selects the first or the last.
        self._fade_out = SubsampledDetector(
            ThresholdDetector(settings.black_level, 0, -1.0, add_final_scene=True), 1, rate
        )
        self._fade_in = SubsampledDetector(ThresholdDetector(settings.black_level, 0, 1.0), 1, rate)
        steps = [max(1, round(rate / Fraction(fade_rate))) for fade_rate, _ in settings.fade_rates]
        self._fades = [SubsampledDetector(ContentDetector(PROPOSAL_LEVEL, 0), step, rate) for step in steps]

    def add_frame(self, number: int, view: np.ndarray) -> None:
        """Process the next frame, BGR."""
        self.num_frames = number + 1
        self._thumbnails.append(cv2.resize(view, THUMBNAIL_SIZE, interpolation=cv2.INTER_AREA))
        for detector in (self._fade_out, self._fade_in, *self._fades):
            detector.add_frame(number, view)
        if self._is_distinct(number, view):
            self._hard.add_frame(len(self._distinct), view)
            self._distinct.append(number)

    def _is_distinct(self, number: int, view_HWC: np.ndarray) -> bool:
        """Return True if a frame differs from the last distinct one, or the picture has long been still.

        Film at 10 frames a second stored at 30, animation on twos and threes, and variable frame rates that
        are filled up repeat frames. The repeated frames have no change, which would make every new picture
        look like a cut.
        """
        last = self._last_distinct
        if last is None or np.abs(view_HWC - last).mean() > REPEAT_LEVEL:
            self._last_distinct = view_HWC.astype(np.float32)
            self._last_change = number
            return True
        return number - self._last_change > STILL_SECONDS * self._rate

    def cuts(self) -> list[Cut]:
        """Return all cuts in order; no two of them touch."""
        if not self.num_frames:
            return []
        thumbnails_THWC = np.stack(self._thumbnails)
        distinct_THWC = thumbnails_THWC[self._distinct]
        found = self._hard.finish(len(self._distinct))
        hard = [self._distinct[at] for at in found if not _is_flash(distinct_THWC, at)]
        changes = np.abs(np.diff(thumbnails_THWC.astype(np.int16), axis=0)).mean((1, 2, 3))
        hard = [at for at in hard if not is_judder(changes, at - 1, round(STILL_SECONDS * self._rate))]
        fade_outs, fade_ins = self._fade_out.finish(self.num_frames), self._fade_in.finish(self.num_frames)
        cuts = [Cut(at, at, "hard") for at in hard]
        black_spans = zip_longest(fade_outs, fade_ins, fillvalue=self.num_frames)
        cuts += [Cut(begin, end, "black") for begin, end in black_spans]
        margin = round(FADE_MARGIN * self._rate)
        for detector, (_, level) in zip(self._fades, self._settings.fade_rates, strict=True):
            for number in detector.finish(self.num_frames):
                near = range(max(0, number - detector.step), min(self.num_frames, number + detector.step))
                inside = find_blended_frames(
                    thumbnails_THWC, near, max(1, detector.step // 2), level, self._settings.max_blend_error
                )
                if inside:
                    begin, end = inside[0] - margin, inside[-1] + 1 + margin
                    cuts.append(Cut(max(0, begin), min(self.num_frames, end), "fade"))
        return _merge_touching(cuts)


class SubsampledDetector:
    """A detector that sees every `step`-th frame."""

    def __init__(self, detector: SceneDetector, step: int, rate: Fraction) -> None:
        self.step = step
        self._detector = detector
        self._rate = rate / step
        self._found: list[int] = []

    def add_frame(self, number: int, view: np.ndarray) -> None:
        """Pass on the frame if its number is a multiple of `step`."""
        if number % self.step == 0:
            time = FrameTimecode(number // self.step, self._rate)
            self._found += [cut.frame_num * self.step for cut in self._detector.process_frame(time, view)]

    def finish(self, num_frames: int) -> list[int]:
        """Return the first frame of each new shot."""
        last = FrameTimecode((num_frames - 1) // self.step, self._rate)
        return self._found + [cut.frame_num * self.step for cut in self._detector.post_process(last)]


def find_blended_frames(
    frames: np.ndarray, near: range, half: int, level: float, max_error: float
) -> list[int]:
    """Return the frames in `near` inside a cross-fade, judged by the frames `half` before and after each.

    The two differ by at least `level`, and the frame between them deviates from their mean by at most the
    fraction `max_error` of that difference.
    """
    inside = []
    for number in range(max(half, near.start), min(len(frames) - half, near.stop)):
        before, middle, after = frames[number - half : number + half + 1 : half].astype(np.float32)
        change = np.abs(after - before).mean()
        if change >= level and np.abs(middle - (before + after) / 2).mean() <= max_error * change:
            inside.append(number)
    return inside


def is_judder(changes: np.ndarray, number: int, radius: int) -> bool:
    """Return True if at least MIN_JUMPS similar changes are within `radius` frames of change `number`.

    A low frame rate stored at a higher one has such changes. If the encoding is coarse or grain was added
    later, its repeated frames are not exact copies: they count as distinct, and every jump is much larger
    than the changes around it.
    """
    others = np.concatenate(
        [changes[max(0, number - radius) : number], changes[number + 1 : number + 1 + radius]]
    )
    if len(others) < MIN_JUMPS or changes[number] >= CERTAIN_LEVEL:
        return False
    return bool(changes[number] < JUMP_RATIO * np.sort(others)[-MIN_JUMPS])


def _is_flash(frames_THWC: np.ndarray, at: int) -> bool:
    """Return True if the picture before a change returns soon after it."""
    last = len(frames_THWC) - 1
    numbers = (max(0, at - MAX_FLASH_FRAMES), min(last, at + MAX_FLASH_FRAMES - 1), at - 1, at)
    before, after, left, entered = frames_THWC[list(numbers)].astype(np.float32)
    return bool(np.abs(after - before).mean() < np.abs(entered - left).mean() / 2)


def _merge_touching(cuts: Sequence[Cut]) -> list[Cut]:
    """Merge cuts that touch; the longest one determines the kind."""
    merged: list[Cut] = []
    for cut in sorted(cuts, key=lambda cut: (cut.begin, cut.end)):
        if merged and cut.begin <= merged[-1].end:
            last = merged.pop()
            kind = max(last, cut, key=lambda part: part.end - part.begin).kind
            cut = Cut(last.begin, max(last.end, cut.end), kind)
        merged.append(cut)
    return merged
