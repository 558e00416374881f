"""Probing of external WebDataset shards: the contents of their samples, read from the files themselves.

tars.py finds the members of a sample, PyAV decodes its pixels, sidecar.py reads its captions and annotations.
"""

from __future__ import annotations

import math
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import av
import numpy as np

from svd_ds.data.decoding import MAX_UNTIMED_FRAMES, decode, open_video
from svd_ds.data.quarantine import Fault, describe_error, is_out_of_memory
from svd_ds.data.sample import MEDIA, STILLS, Sample, parse_sample
from svd_ds.data.sidecar import (
    TEXTS,
    clean_text,
    decode_caption,
    is_utf8,
    parse_annotations,
    parse_captions,
    parse_json,
)
from svd_ds.data.tars import Members, read_contents, read_member
from svd_ds.data.timeline import read_timeline
from svd_ds.pixels.frame import to_rgb

NO_CAPTION = "without a caption"
NOT_UTF8 = "with a caption that is not UTF-8"
BAD_ANNOTATIONS = "annotations that are not finite numbers"
SEVERAL_MEDIA = "with several videos or images"

ReadFrames = Callable[[range], Iterator[np.ndarray]]
"""Reads frames of a video: frame numbers -> these frames as uint8 RGB, (H, W, 3)."""
ScoreMotion = Callable[[ReadFrames, int, float], float]
"""Scores the motion of a video: (reader of its frames, number of frames, frames a second) -> motion score."""


@dataclass(frozen=True)
class ProbedSample:
    """Sample that training can use."""

    sample: Sample
    notes: dict[str, int] = field(default_factory=dict)
    """Remarks for the user: NO_CAPTION, NOT_UTF8, BAD_ANNOTATIONS or SEVERAL_MEDIA -> number of cases."""


def probe_shard(path: Path, name: str, motion: ScoreMotion | None) -> Iterator[ProbedSample | Fault]:
    """Yield the index entry of each sample of a shard, or the fault that makes it unusable.

    An error in a sample or in the tar is yielded as a Fault, not raised. All samples have shard number 0.

    Args:
        path: path of the shard.
        name: name of the shard in its folder; it is part of the sample ids, since keys repeat between shards.
        motion: scores a video; None leaves all motion scores at 0.

    Raises:
        MemoryError: the machine ran out of memory.
    """
    shown = clean_text(name)
    try:
        contents = read_contents(path)
        for member, reason in contents.refused:
            yield Fault(member, shown, reason)
        for key, members in contents.samples.items():
            sample_id = make_sample_id(shown, key)
            try:
                yield _probe(path, members, sample_id, motion)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                yield Fault(sample_id, shown, describe_error(error))
        if contents.damage is not None:
            yield Fault("", shown, f"the tar cannot be read to its end: {contents.damage}")
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(f"memory ran out while {shown} was read") from error
        yield Fault("", shown, f"the tar cannot be read: {describe_error(error)}")


def make_sample_id(shard: str, key: str) -> str:
    """Make the id of a sample from the name of its shard and its key."""
    return re.sub(r"[^\w-]+", "_", f"{PurePosixPath(shard).with_suffix('')}-{clean_text(key)}")


def _probe(path: Path, members: Members, sample_id: str, motion: ScoreMotion | None) -> ProbedSample:
    """Make the index entry of a sample.

    Raises:
        ValueError: the sample cannot be used.
        Exception: any error that a decoder raises on a damaged file.
    """
    read = partial(read_member, path)
    notes: Counter[str] = Counter()
    media = choose_media(members)
    if len(_media_in(members)) > 1:
        notes[SEVERAL_MEDIA] += 1
    used = {media.rpartition(".")[2]: members[media]}
    annotations = _add_sidecar(members, read, used, notes)
    content = read(members[media])
    num_frames, fps, height, width = measure_media(content, _suffix(media) in STILLS)
    score = 0.0
    if motion is not None and num_frames > 1:
        score = motion(partial(_rgb_frames, content), num_frames, fps)
        if not math.isfinite(score):
            raise ValueError(f"its motion score is {score}")
    sample = Sample(
        id=sample_id,
        shard=0,
        members={name: (entry.offset_data, entry.size) for name, entry in used.items()},
        num_frames=num_frames,
        fps=fps,
        height=height,
        width=width,
        motion=round(score, 6),
        annotations=annotations,
    )
    return ProbedSample(parse_sample(sample.as_row()), dict(+notes))


def choose_media(members: Iterable[str]) -> str:
    """Choose the member that holds a sample's pixels: a video before an image, NAME.mp4 before NAME.rgb.mp4.

    Args:
        members: extensions of the sample's members.

    Returns:
        The extension of the chosen member.

    Raises:
        ValueError: no member is a video or an image, or several have the same rank.
    """
    found = _media_in(members)
    if not found:
        raise ValueError(f"none of its members ({', '.join(sorted(members))}) is a video or an image")
    best = min(map(_rank, found))
    chosen = [extension for extension in found if _rank(extension) == best]
    if len(chosen) > 1:
        kind = "images" if best[0] else "videos"
        raise ValueError(f"it has {len(chosen)} {kind} ({', '.join(chosen)}), and only one can be used")
    return chosen[0]


def _media_in(members: Iterable[str]) -> list[str]:
    return sorted(extension for extension in members if _suffix(extension) in MEDIA)


def _rank(extension: str) -> tuple[bool, bool]:
    """Sort key of a video or image member: the lowest is chosen."""
    return _suffix(extension) in STILLS, "." in extension


def _suffix(extension: str) -> str:
    return extension.rpartition(".")[2]


def _add_sidecar(
    members: Members,
    read: Callable[[tarfile.TarInfo], bytes],
    used: dict[str, tarfile.TarInfo],
    notes: Counter[str],
) -> dict[str, float]:
    """Add the member with the captions to `used`, and merge the annotations of all JSON members.

    NAME.json comes before NAME.mp4.json, then the others by name; a JSON comes before a text. If two members
    have the same annotation, the first one counts.

    Args:
        members: all members of the sample.
        read: reads a member.
        used: extension -> entry of the members that the index lists; changed in place.
        notes: remarks on the sample; changed in place.

    Raises:
        ValueError: no caption was found, and one of the members cannot be read.
    """
    annotations: dict[str, float] = {}
    damage: Exception | None = None
    jsons = [extension for extension in members if _suffix(extension) == "json"]
    for extension in sorted(jsons, key=lambda name: ("." in name, _suffix(name[:-5]) not in MEDIA, name)):
        try:
            metadata = parse_json(read(members[extension]), extension)
        except ValueError as error:
            damage = damage or error
            continue
        found, dropped = parse_annotations(metadata)
        annotations = found | annotations
        notes[BAD_ANNOTATIONS] += dropped
        if "json" not in used and any(parse_captions(metadata).values()):
            used["json"] = members[extension]
    texts = [extension for extension in members if _suffix(extension) in TEXTS]
    for extension in sorted(texts, key=lambda name: ("." in name, TEXTS.index(_suffix(name)), name)):
        if "json" in used or "txt" in used:
            break
        content = read(members[extension])
        try:
            if decode_caption(content):
                used["txt"] = members[extension]
                notes[NOT_UTF8] += not is_utf8(content)
        except ValueError as error:
            damage = damage or error
    if "json" not in used and "txt" not in used:
        if damage is not None:
            raise damage
        notes[NO_CAPTION] += 1
    return annotations


def measure_media(content: bytes, still: bool) -> tuple[int, float, int, int]:
    """Measure a video or image file; its frames are counted as in `decoding.decode`.

    Args:
        content: bytes of the file.
        still: True if the file is an image.

    Returns:
        (number of frames, frames a second, shown height, shown width).

    Raises:
        ValueError: the file cannot be decoded to its end, or its pixels are not square.
    """
    if still:
        height, width = to_rgb(next(decode(content, [0]))).shape[:2]
        return 1, 1.0, height, width
    with open_video(content) as (container, stream):
        aspect = stream.sample_aspect_ratio
        _check_complete(stream, len(content))
        timeline = read_timeline(container, stream)
        fps = float(stream.average_rate or 0)
    if timeline is not None:
        num_frames, fps = len(timeline.times), timeline.rate
    else:
        num_frames = _count_frames(content)
    if not num_frames:
        raise ValueError("none of its frames can be decoded")
    if aspect not in (None, 0, 1):
        raise ValueError(f"its pixels are not square, but {aspect}")
    if not (fps > 0 and math.isfinite(fps)):
        raise ValueError("it has no frame rate")
    *_, last = _check_one_size(decode(content, sorted({0, num_frames - 1})))
    height, width = to_rgb(last).shape[:2]
    return num_frames, fps, height, width


def _count_frames(content: bytes) -> int:
    """Count the frames of a video whose packets have no presentation times, by decoding all of it.

    Raises:
        ValueError: there are more than MAX_UNTIMED_FRAMES.
    """
    count = 0
    with open_video(content) as (container, stream):
        for count, _ in enumerate(container.decode(stream), 1):
            if count > MAX_UNTIMED_FRAMES:
                raise ValueError(
                    f"it has no presentation times, and more than {MAX_UNTIMED_FRAMES} frames: each could "
                    "only be found by decoding all frames before it; convert it to mp4"
                )
    return count


def _check_complete(stream: Any, num_bytes: int) -> None:
    """Check that a file is as long as the index in its header says.

    Raises:
        ValueError: the file is cut short.
    """
    end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if end > num_bytes:
        raise ValueError(f"it is cut short: it has {num_bytes} bytes, and its frames end at byte {end}")


def _check_one_size(frames: Iterable[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Yield the frames, and check that they have one size.

    Raises:
        ValueError: the size changes, as in the recording of a video call.
    """
    size: tuple[int, int] | None = None
    for frame in frames:
        size = size or (frame.width, frame.height)
        if (frame.width, frame.height) != size:
            raise ValueError(f"its frames change from {size[0]}x{size[1]} to {frame.width}x{frame.height}")
        yield frame


def _rgb_frames(content: bytes, numbers: range) -> Iterator[np.ndarray]:
    """Decode frames by number; each is uint8 RGB, (H, W, 3)."""
    return (to_rgb(frame).numpy() for frame in _check_one_size(decode(content, numbers)))
