"""Stage 3: clips cut from shots, copied between keyframes if that loses little, else encoded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import pyarrow as pa
import torch

from svd_ds.curate.frames import read_frames, resize, to_upright
from svd_ds.curate.media import ClipEncoder, copy_frames, encode_still
from svd_ds.curate.raw import RawFile
from svd_ds.curate.stages import StageContext
from svd_ds.curate.table import Row, RowsByStage
from svd_ds.fsync_io import replace_bytes
from svd_ds.pixels.still import read_still

COLUMNS = {
    "id": pa.string(),
    "start_frame": pa.int64(),
    "end_frame": pa.int64(),
    "fps": pa.float64(),
    "height": pa.int32(),
    "width": pa.int32(),
    "method": pa.string(),
    "media": pa.string(),
}


@dataclass(frozen=True)
class ClipCutSettings:
    """Length and size of clips; lengths are in frames ("48") or seconds ("2s")."""

    shortest: str = "2s"
    longest: str = "20s"
    """Maximum length; longer shots give several clips."""
    stride: str | None = None
    """Distance between the starts of consecutive clips; None for adjacent clips."""
    size: int = 0
    """Shortest side to which larger frames are reduced, in pixels; 0 keeps the size."""
    trim: float = 0.25
    """Maximum fraction of a clip that may be lost by cutting at keyframes instead of encoding; negative
    encodes all clips."""


@dataclass(frozen=True)
class Window:
    """Frames `begin` to `end`, exclusive, of a video."""

    begin: int
    end: int
    copied: bool = False


def cut_clips(
    settings: ClipCutSettings, file: RawFile, inputs: RowsByStage, context: StageContext
) -> Iterator[Row]:
    """Write the clips of a file to the stage's folder, and yield a row for each.

    Raises:
        ValueError: some shots are too short for a clip (raised after the rows of the others).
    """
    (probed,) = inputs["probe"]
    rate = Fraction(probed["rate"])
    if probed["kind"] == "image":
        still = resize(torch.from_numpy(read_still(file.path)), Fraction(1), settings.size)
        yield _save_clip(file, context, Window(0, 1), rate, encode_still(still), still.shape[:2])
        return
    shots = [(shot["begin"], shot["end"]) for shot in inputs["cuts"]]
    windows = plan_windows(shots, probed, settings)
    if not windows:
        longest = max(end - begin for begin, end in shots)
        needed = count_frames(settings.shortest, rate)
        raise ValueError(f"its longest shot has {longest} frames, but a clip needs at least {needed}")
    to_encode = []
    for window in windows:
        content = None
        if window.copied:
            content = copy_frames(file.path, rate, probed["first_pts"], window.begin, window.end)
        if content is None:
            to_encode.append(Window(window.begin, window.end))
        else:
            yield _save_clip(file, context, window, rate, content, (probed["height"], probed["width"]))
    yield from _encode(file, context, to_encode, probed, settings.size)
    if short := [end - begin for begin, end in shots if end - begin < count_frames(settings.shortest, rate)]:
        raise ValueError(
            f"{len(short)} of its {len(shots)} shots have fewer than {count_frames(settings.shortest, rate)} "
            f"frames: {sum(short)} frames give no clip"
        )


def _encode(
    file: RawFile, context: StageContext, windows: Sequence[Window], probed: Row, size: int
) -> Iterator[Row]:
    """Decode the video once and encode its windows, which are sorted by their start and may overlap."""
    rate, pixel_aspect = Fraction(probed["rate"]), Fraction(probed["pixel_aspect"])
    waiting, running = list(windows), dict[Window, ClipEncoder]()
    for number, frame in read_frames(file.path, rate) if windows else ():
        if not waiting and not running:
            break
        if not running and number < waiting[0].begin:
            continue
        pixels = to_upright(frame, pixel_aspect, size)
        height, width = pixels.shape[:2]
        while waiting and waiting[0].begin == number:
            running[waiting.pop(0)] = ClipEncoder(rate, height, width)
        for window, encoder in list(running.items()):
            encoder.add(pixels)
            if number == window.end - 1:
                content = running.pop(window).finish()
                yield _save_clip(file, context, window, rate, content, (height, width))


def _save_clip(
    file: RawFile,
    context: StageContext,
    window: Window,
    rate: Fraction,
    content: bytes,
    size: tuple[int, ...],
) -> Row:
    """Write a clip's file, and return its row."""
    name = f"{file.key}-{window.begin:06d}"
    media = f"{name}.{'jpg' if window.end - window.begin == 1 else 'mp4'}"
    context.folder.mkdir(parents=True, exist_ok=True)
    # Two machines may process one file at once: both write equal content.
    replace_bytes(context.folder / media, content)
    return {
        "id": name,
        "start_frame": window.begin,
        "end_frame": window.end,
        "fps": float(rate),
        "height": size[0],
        "width": size[1],
        "method": "copied" if window.copied else "encoded",
        "media": str((context.folder / media).relative_to(context.out)),
    }


def plan_windows(shots: Sequence[tuple[int, int]], probed: Row, settings: ClipCutSettings) -> list[Window]:
    """Choose the clips of a video's shots.

    A clip is snapped to the keyframes inside it, and copied, if the video can be copied, the clip stays long
    enough, and at most the fraction `settings.trim` is lost (arXiv 2311.15127, section 3.1).

    Args:
        shots: first and last (exclusive) frame of each shot.
        probed: the video's row of the probe stage.
        settings: length and size of clips.

    Raises:
        ValueError: the lengths or the stride are out of range at the video's frame rate.
    """
    rate = Fraction(probed["rate"])
    shortest, longest = (count_frames(length, rate) for length in (settings.shortest, settings.longest))
    stride = count_frames(settings.stride, rate) if settings.stride else None
    if not 2 <= shortest <= longest:
        raise ValueError(
            f"at its {float(rate):.3g} frames a second a clip of {settings.shortest} to {settings.longest} "
            f"has {shortest} to {longest} frames, but a clip needs at least 2"
        )
    if stride is not None and not 1 <= stride <= shortest:
        raise ValueError(f"the stride is {stride} frames: it must be from 1 to the clip length of {shortest}")
    keyframes = _copyable_keyframes(probed, settings)
    windows = []
    for begin, end in shots:
        while end - begin >= shortest:
            window = Window(begin, min(begin + longest, end))
            windows.append(_snap_to_keyframes(window, keyframes, shortest, settings.trim))
            begin = begin + stride if stride else window.end
    return windows


def _copyable_keyframes(probed: Row, settings: ClipCutSettings) -> list[int]:
    """Return the frames at which the video can be cut without encoding; empty if it must be encoded."""
    shortest_side = min(probed["height"], probed["width"])
    can_be_copied = (
        (probed["codec"], probed["pixel_format"]) == ("h264", "yuv420p")
        and probed["constant_rate"]
        and probed["plain"]
        and probed["pixel_aspect"] == "1"
        and probed["height"] % 2 == probed["width"] % 2 == 0
        and not 0 < settings.size < shortest_side
    )
    return [*probed["keyframes"], probed["num_frames"]] if can_be_copied else []


def _snap_to_keyframes(window: Window, keyframes: Sequence[int], shortest: int, trim: float) -> Window:
    """Shrink a window to keyframes if that loses little; else return it unchanged."""
    inside = [frame for frame in keyframes if window.begin <= frame <= window.end]
    length = window.end - window.begin
    if inside and inside[-1] - inside[0] >= max(shortest, (1 - trim) * length):
        return Window(inside[0], inside[-1], copied=True)
    return window


def count_frames(length: str, rate: Fraction) -> int:
    """Convert a length to frames: "48" is 48, "2s" is the number of frames in two seconds at `rate`.

    Raises:
        ValueError: the length has neither form.
    """
    match = re.fullmatch(r"(\d+)|(\d*\.?\d+)s", length)
    if not match:
        raise ValueError(f"{length!r} is neither a number of frames (48) nor of seconds (2s)")
    return int(match[1]) if match[1] else round(float(match[2]) * rate)
