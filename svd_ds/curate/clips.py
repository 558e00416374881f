"""Third stage: shots become clips, cut at keyframes and copied where that loses little, else encoded anew."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import pyarrow as pa
import torch

from svd_ds.curate.frames import read_frames, resized, upright
from svd_ds.curate.media import ClipEncoder, copy_frames, encode_still
from svd_ds.curate.raw import RawFile
from svd_ds.curate.stages import Place
from svd_ds.curate.table import Known, Row
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
class ClipSettings:
    """How long and how large clips are; lengths are frames ("48") or seconds ("2s")."""

    shortest: str = "2s"
    longest: str = "20s"
    """Longer shots give several clips."""
    stride: str | None = None
    """From one clip's start to the next's; None: clips that follow each other."""
    size: int = 0
    """Shortest side to which frames are reduced, in pixels; 0, or one that would enlarge, keeps them."""
    trim: float = 0.25
    """Share of a clip that may be lost for ending on keyframes, so that it need not be encoded; below 0 all
    are encoded."""


@dataclass(frozen=True)
class Window:
    """Frames `begin` to `end`, exclusive, of a video."""

    begin: int
    end: int
    copied: bool = False


def cut_clips(settings: ClipSettings, file: RawFile, known: Known, place: Place) -> Iterator[Row]:
    """Write the clips of a file to their place; a row for each.

    Raises:
        ValueError: after the rows, where not every shot is long enough for a clip.
    """
    (about,) = known["probe"]
    rate = Fraction(about["rate"])
    if about["kind"] == "image":
        still = resized(torch.from_numpy(read_still(file.path)), Fraction(1), settings.size)
        yield _write(file, place, Window(0, 1), rate, encode_still(still), still.shape[:2])
        return
    shots = [(shot["begin"], shot["end"]) for shot in known["cuts"]]
    windows = plan(shots, about, settings)
    if not windows:
        longest = max(end - begin for begin, end in shots)
        needed = count_frames(settings.shortest, rate)
        raise ValueError(f"its longest shot has {longest} frames, and a clip needs {needed}")
    left = []
    for window in windows:
        content = None
        if window.copied:
            content = copy_frames(file.path, rate, about["first"], window.begin, window.end)
        if content is None:
            left.append(Window(window.begin, window.end))
        else:
            yield _write(file, place, window, rate, content, (about["height"], about["width"]))
    yield from _encode(file, place, left, about, settings.size)
    if short := [end - begin for begin, end in shots if end - begin < count_frames(settings.shortest, rate)]:
        raise ValueError(
            f"{len(short)} of its {len(shots)} shots have fewer than {count_frames(settings.shortest, rate)} "
            f"frames: {sum(short)} frames give no clip"
        )


def _encode(file: RawFile, place: Place, windows: Sequence[Window], about: Row, size: int) -> Iterator[Row]:
    """Decode the video once and encode its windows, in order of their beginnings; they may overlap."""
    rate, pixel_aspect = Fraction(about["rate"]), Fraction(about["pixel_aspect"])
    waiting, running = list(windows), dict[Window, ClipEncoder]()
    for number, frame in read_frames(file.path, rate) if windows else ():
        if not waiting and not running:
            break
        if not running and number < waiting[0].begin:
            continue
        pixels = upright(frame, pixel_aspect, size)
        height, width = pixels.shape[:2]
        while waiting and waiting[0].begin == number:
            running[waiting.pop(0)] = ClipEncoder(rate, height, width)
        for window, encoder in list(running.items()):
            encoder.add(pixels)
            if number == window.end - 1:
                content = running.pop(window).finish()
                yield _write(file, place, window, rate, content, (height, width))


def _write(
    file: RawFile, place: Place, window: Window, rate: Fraction, content: bytes, size: tuple[int, ...]
) -> Row:
    name = f"{file.key}-{window.begin:06d}"
    media = f"{name}.{'jpg' if window.end - window.begin == 1 else 'mp4'}"
    place.here.mkdir(parents=True, exist_ok=True)
    # A part may run twice at once: both write the same.
    replace_bytes(place.here / media, content)
    return {
        "id": name,
        "start_frame": window.begin,
        "end_frame": window.end,
        "fps": float(rate),
        "height": size[0],
        "width": size[1],
        "method": "copied" if window.copied else "encoded",
        "media": str((place.here / media).relative_to(place.out)),
    }


def plan(shots: Sequence[tuple[int, int]], about: Row, settings: ClipSettings) -> list[Window]:
    """The clips of a video's shots, as `settings` wants them.

    A clip is snapped to the keyframes inside it, and copied, where the video can be copied, it stays long
    enough, and no more than the allowed share is lost (arXiv 2311.15127, section 3.1).
    """
    rate = Fraction(about["rate"])
    shortest, longest = (count_frames(length, rate) for length in (settings.shortest, settings.longest))
    stride = count_frames(settings.stride, rate) if settings.stride else None
    if not 2 <= shortest <= longest:
        raise ValueError(
            f"at its {float(rate):.3g} frames a second a clip of {settings.shortest} to {settings.longest} "
            f"has {shortest} to {longest} frames, and a clip needs 2"
        )
    if stride is not None and not 1 <= stride <= shortest:
        raise ValueError(f"a stride of {stride} frames is not between 1 and the clip's {shortest}")
    keyframes = _keyframes(about, settings)
    windows = []
    for begin, end in shots:
        while end - begin >= shortest:
            window = Window(begin, min(begin + longest, end))
            windows.append(_snapped(window, keyframes, shortest, settings.trim))
            begin = begin + stride if stride else window.end
    return windows


def _keyframes(about: Row, settings: ClipSettings) -> list[int]:
    """Where the video can be cut without encoding; nowhere, if its frames are not as they are to be
    stored."""
    shortest_side = min(about["height"], about["width"])
    as_stored = (
        (about["codec"], about["pixels"]) == ("h264", "yuv420p")
        and about["even"]
        and about["plain"]
        and about["pixel_aspect"] == "1"
        and about["height"] % 2 == about["width"] % 2 == 0
        and not 0 < settings.size < shortest_side
    )
    return [*about["keyframes"], about["num_frames"]] if as_stored else []


def _snapped(window: Window, keyframes: Sequence[int], shortest: int, trim: float) -> Window:
    inside = [frame for frame in keyframes if window.begin <= frame <= window.end]
    length = window.end - window.begin
    if inside and inside[-1] - inside[0] >= max(shortest, (1 - trim) * length):
        return Window(inside[0], inside[-1], copied=True)
    return window


def count_frames(length: str, rate: Fraction) -> int:
    """Frames in a length: "48" is 48, "2s" as many as two seconds have at `rate`; ValueError for the rest."""
    match = re.fullmatch(r"(\d+)|(\d*\.?\d+)s", length)
    if not match:
        raise ValueError(f"{length!r} is neither a number of frames (48) nor of seconds (2s)")
    return int(match[1]) if match[1] else round(float(match[2]) * rate)
