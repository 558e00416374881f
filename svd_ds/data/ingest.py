"""From a video or image file to training clips: windows that cross no hard cut, encoded small."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, count
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace
from PIL import Image, ImageOps, UnidentifiedImageError

from svd_ds.data.clips import HD_HEIGHT, Box, fit, to_rgb
from svd_ds.data.flow import motion_score

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".gif")
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
SIDECARS = (".txt", ".json")
TOLD = ("caption", "captions", "elevation", "annotations")
"""What a .json beside a file may tell of it."""
THUMBNAIL = (64, 36)
"""Width and height at which neighbouring frames are compared."""
CUT_LEVELS = 25.0
"""A hard cut changes the thumbnail by more levels of 255 on average ..."""
CUT_RATIO = 2.5
"""... and so many times more than the frames before and after it change: fast motion and flashes do not."""
KEYFRAME_EVERY = 12
"""A loader that starts inside a clip decodes at most so many frames too many."""


@dataclass(frozen=True)
class RawClip:
    """Consecutive frames of a file, at the size in which they are to be stored."""

    frames: list[np.ndarray]
    """uint8 RGB, (H, W, 3) each, H and W even."""
    rate: Fraction
    """Frames a second."""
    start_frame: int
    """Number of the first frame in the file; the last is start_frame + len(frames) - 1."""


def find_files(folder: Path, out: Path) -> list[Path]:
    """Everything in `folder`, at any depth, but hidden files, sidecars, and what lies under `out`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."]
    media = {path.with_suffix("") for path in files if path.suffix.lower() in VIDEOS + IMAGES}
    sidecars = {path for path in files if path.suffix in SIDECARS and path.with_suffix("") in media}
    return [path for path in files if path not in sidecars and out.resolve() not in path.resolve().parents]


def free_key(source: str, taken: set[str]) -> str:
    """A sample key from a file's path, added to `taken`; numbered where another file has it already."""
    stem = re.sub(r"[^\w-]+", "_", str(Path(source).with_suffix("")))
    key = next(key for key in chain([stem], (f"{stem}_{n}" for n in count(2))) if key not in taken)
    taken.add(key)
    return key


def clips_of(path: Path, length: str, stride: str | None, size: int) -> Iterator[RawClip]:
    """The clips of a file, as `read_video` and `read_image` cut them."""
    suffix = path.suffix.lower()
    if suffix in VIDEOS:
        yield from read_video(path, length, stride, size)
    elif suffix in IMAGES:
        yield read_image(path, size)
    else:
        raise ValueError(f"it is neither a video nor an image by its suffix {suffix!r}")


def read_video(path: Path, length: str, stride: str | None, size: int) -> Iterator[RawClip]:
    """The clips of a video, in order; what is left before a cut or the end is dropped.

    Args:
        length: of a clip: frames ("48") or seconds ("2s").
        stride: from the start of one clip to that of the next, likewise; None for `length`.
        size: shortest side of the stored frames, in pixels; 0, or one that would enlarge, keeps them.

    Raises ValueError where the file has no video, cannot be decoded from here on, or is too short for a clip.
    """
    try:
        with av.open(str(path), mode="r") as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = stream.average_rate
            if not rate:
                raise ValueError("it has no frame rate")
            num_frames = count_frames(length, rate)
            step = count_frames(stride or length, rate)
            if not 1 <= step <= num_frames:
                raise ValueError(f"a stride of {step} frames is not between 1 and the clip's {num_frames}")
            aspect = stream.sample_aspect_ratio or Fraction(1)
            window: list[np.ndarray] = []
            longest = 0
            for number, (frame, is_cut) in enumerate(mark_cuts(container.decode(stream))):
                if is_cut:
                    window = []
                window.append(_upright(frame, aspect, size))
                if len(window) == num_frames:
                    yield RawClip(window, rate, number - num_frames + 1)
                    window = window[step:]
                    longest = num_frames
                longest = max(longest, len(window))
            if longest < num_frames:
                raise ValueError(f"its longest shot has {longest} frames, and a clip needs {num_frames}")
    except av.FFmpegError as error:
        raise ValueError(f"it cannot be decoded ({error.strerror})") from error


def read_image(path: Path, size: int) -> RawClip:
    """A still image as a clip of one frame. Raises ValueError if it cannot be read."""
    try:
        with Image.open(path) as image:
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"it cannot be read ({error})") from error
    return RawClip([_resized(torch.from_numpy(pixels).permute(2, 0, 1), Fraction(1), size)], Fraction(1), 0)


def count_frames(length: str, rate: Fraction) -> int:
    """Frames in a length: "48" is 48, "2s" as many as two seconds have at `rate`; ValueError for the rest."""
    match = re.fullmatch(r"(\d+)|(\d*\.?\d+)s", length)
    if not match:
        raise ValueError(f"{length!r} is neither a number of frames (48) nor of seconds (2s)")
    return int(match[1]) if match[1] else round(float(match[2]) * rate)


def mark_cuts(frames: Iterator[VideoFrame]) -> Iterator[tuple[VideoFrame, bool]]:
    """Each frame, and whether a hard cut lies right before it. One frame is held back to look ahead."""
    held: VideoFrame | None = None
    thumbnail = np.zeros((0, 0, 3), dtype=np.float32)
    before, change = 0.0, 0.0
    for frame in frames:
        small = frame.reformat(*THUMBNAIL, format="rgb24", threads=1).to_ndarray()
        small = cv2.GaussianBlur(small, (5, 5), 0).astype(np.float32)
        if held is not None:
            after = float(np.abs(small - thumbnail).mean())
            yield held, change > max(CUT_LEVELS, CUT_RATIO * before, CUT_RATIO * after)
            before, change = change, after
        held, thumbnail = frame, small
    if held is not None:
        yield held, change > max(CUT_LEVELS, CUT_RATIO * before)


def encode(clip: RawClip) -> tuple[str, bytes]:
    """The extension and bytes of a clip: H.264 in mp4, or JPEG for a single frame.

    No B-frames, so that seeking is exact. One thread and no macroblock tree, so that the same frames give the
    same bytes: x264's assembly for the tree reads memory that nobody wrote (core 165, MALLOC_PERTURB_=1).
    """
    buffer = io.BytesIO()
    height, width = clip.frames[0].shape[:2]
    if len(clip.frames) == 1:
        Image.fromarray(clip.frames[0]).save(buffer, format="JPEG", quality=95)
        return "jpg", buffer.getvalue()
    # Left untagged, the colours are taken as to_rgb and all players take them.
    matrix = Colorspace.ITU709 if height >= HD_HEIGHT else Colorspace.ITU601
    with av.open(buffer, mode="w", format="mp4") as container:
        options = {"crf": "18", "preset": "medium", "bf": "0", "g": str(KEYFRAME_EVERY), "mbtree": "0"}
        stream = container.add_stream("libx264", rate=clip.rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.thread_count = 1
        for pixels in clip.frames:
            frame = VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=matrix, threads=1)))
        container.mux(stream.encode())
    return "mp4", buffer.getvalue()


def describe(clip: RawClip, told: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What the sample's json holds: what was told of the file (`told_of`), and what is measured here."""
    height, width = clip.frames[0].shape[:2]
    return {
        **told,
        "num_frames": len(clip.frames),
        "fps": float(clip.rate),
        "height": height,
        "width": width,
        "motion": round(motion_score(clip.frames, float(clip.rate)), 6),
        "source": source,
        "start_frame": clip.start_frame,
        "end_frame": clip.start_frame + len(clip.frames),
    }


def told_of(path: Path) -> dict[str, Any]:
    """Captions, and what else the files beside `path` tell of it, as a sample's json holds it.

    `clip.txt` holds a caption. `clip.json` may have a "caption", or "captions" by captioner; "elevation", the
    camera's in degrees; "annotations", numbers by name. Without captions the file's own name is one. Raises
    ValueError for values of another kind.
    """
    note, content = path.with_suffix(".txt"), _table_beside(path)
    captions = content.get("captions", {"text": content["caption"]} if "caption" in content else {})
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise ValueError(f'{path.stem}.json has a "caption" or "captions" that are not texts')
    if not captions and note.is_file():
        captions = {"text": " ".join(note.read_text().split())}
    told: dict[str, Any] = {"captions": captions or {"name": re.sub(r"[\W_]+", " ", path.stem).strip()}}

    elevation, annotations = content.get("elevation"), content.get("annotations", {})
    if elevation is not None:
        if not _is_number(elevation) or not -90 <= elevation <= 90:
            raise ValueError(f'"elevation" is {elevation!r} in {path.stem}.json: no angle, -90 to 90 degrees')
        told["elevation"] = float(elevation)
    if not isinstance(annotations, dict) or not all(map(_is_number, annotations.values())):
        raise ValueError(f'"annotations" in {path.stem}.json are not numbers by name')
    if annotations:
        told["annotations"] = annotations
    return told


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _table_beside(path: Path) -> dict[str, Any]:
    table = path.with_suffix(".json")
    if not table.is_file():
        return {}
    content = json.loads(table.read_text())
    if not isinstance(content, dict) or content.keys().isdisjoint(TOLD):
        raise ValueError(f"{table.name} is no json object with one of {', '.join(TOLD)}")
    return content


def _upright(frame: VideoFrame, pixel_aspect: Fraction, size: int) -> np.ndarray:
    """A decoded frame as it is meant to be shown: rotated as the file says, with square pixels."""
    pixels_CHW = to_rgb(frame)
    quarter_turns = round(frame.rotation / 90) % 4
    if quarter_turns % 2:
        pixel_aspect = 1 / pixel_aspect
    return _resized(torch.rot90(pixels_CHW, quarter_turns, (1, 2)), pixel_aspect, size)


def _resized(frame_CHW: torch.Tensor, pixel_aspect: Fraction, size: int) -> np.ndarray:
    """(H, W, 3) with square pixels, its shortest side reduced to `size`, both sides even."""
    height, width = frame_CHW.shape[1:]
    shown = (float(height), float(width * pixel_aspect))
    scale = min(1.0, size / min(shown)) if size else 1.0
    new_height, new_width = (max(2, 2 * round(side * scale / 2)) for side in shown)
    resized = fit(frame_CHW, Box(0, 0, height, width), new_height, new_width)
    return resized.permute(1, 2, 0).contiguous().numpy()
