"""Shards that others wrote: what their samples hold, probed from the files themselves.

WebDataset's own habit is all that is asked for: the members of a sample stand beside each other in a tar and
share the name up to its first dot. Pixels are whatever PyAV decodes; captions a text, or a json's.
"""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import av
import numpy as np

from svd_ds.data.clips import decode, to_rgb
from svd_ds.data.quarantine import Fault
from svd_ds.data.sample import MEDIA, STILLS, Sample
from svd_ds.data.sidecar import captions_in

TEXTS = ("txt", "text", "caption")
"""Extensions of a caption."""

Motion = Callable[[Sequence[np.ndarray], float], float]
"""(frames as uint8 RGB (H, W, 3), their rate) -> motion score."""


def samples_in(path: Path, name: str, shard: int, motion: Motion | None) -> Iterator[Sample | Fault]:
    """What the index is to know of each sample of a shard, or why it cannot be used.

    Args:
        name: of the shard in its folder; samples are named after it, as keys may be the same in each.
        shard: its number.
        motion: scores a video; None leaves all at 0.
    """
    ids: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            entries = (entry for entry in tar if entry.isfile())
            for key, group in groupby(entries, key=_key):
                sample_id = re.sub(r"[^\w-]+", "_", f"{Path(name).with_suffix('')}-{key}")
                try:
                    if sample_id in ids:
                        raise ValueError("another sample of the shard has its name")
                    ids.add(sample_id)
                    yield _probe(tar, list(group), sample_id, shard, motion)
                except (ValueError, OSError, av.FFmpegError) as error:
                    yield Fault(sample_id, name, str(error))
    except tarfile.TarError as error:
        yield Fault("", name, f"the tar cannot be read on: {error}")


def _key(entry: tarfile.TarInfo) -> str:
    folder, _, file = entry.name.rpartition("/")
    return f"{folder}/{file.split('.', 1)[0]}".lstrip("./")


def _probe(
    tar: tarfile.TarFile, entries: list[tarfile.TarInfo], sample_id: str, shard: int, motion: Motion | None
) -> Sample:
    """Raises ValueError for a sample that training cannot use."""
    by_extension = {entry.name.rsplit(".", 1)[-1].lower(): entry for entry in reversed(entries)}
    media = next((name for name in MEDIA if name in by_extension), None)
    if media is None:
        raise ValueError(f"none of its members ({', '.join(sorted(by_extension))}) is a video or an image")
    about: Any = json.loads(_read(tar, by_extension["json"])) if "json" in by_extension else {}
    about = about if isinstance(about, dict) else {}
    used = {media: by_extension[media]}
    text = next((name for name in TEXTS if name in by_extension), None)
    if captions_in(about):
        used["json"] = by_extension["json"]
    elif text is not None:
        used["txt"] = by_extension[text]
    num_frames, fps, height, width = measure(content := _read(tar, used[media]), media in STILLS)
    score = 0.0
    if motion is not None and num_frames > 1:
        frames = decode(content, range(num_frames))
        score = motion([to_rgb(frame).numpy() for frame in frames], fps)
    annotations = about.get("annotations", {})
    return Sample(
        id=sample_id,
        shard=shard,
        members={name: (entry.offset_data, entry.size) for name, entry in used.items()},
        num_frames=num_frames,
        fps=fps,
        height=height,
        width=width,
        motion=round(score, 6),
        annotations={name: value for name, value in annotations.items() if isinstance(value, int | float)},
    )


def measure(content: bytes, still: bool) -> tuple[int, float, int, int]:
    """(frames, frames a second, height, width) of a file. Raises ValueError where it cannot be decoded to its
    end, or is not stored as it is shown."""
    with av.open(io.BytesIO(content), mode="r") as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        stream = container.streams.video[0]
        aspect = stream.sample_aspect_ratio
        num_frames = 1 if still else stream.frames
        fps = 1.0 if still else float(stream.average_rate or 0)
        if not num_frames:
            num_frames = sum(packet.size > 0 for packet in container.demux(stream))
    if aspect not in (None, 0, 1):
        raise ValueError(f"its pixels are not square, but {aspect}")
    if not (fps > 0 and math.isfinite(fps)):
        raise ValueError("it has no frame rate")
    *_, last = decode(content, sorted({0, num_frames - 1}))
    if last.rotation:
        raise ValueError(f"it is to be rotated by {last.rotation} degrees")
    return num_frames, fps, last.height, last.width


def _read(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(entry)
    assert file is not None, "members that are no files are passed over"
    content = file.read()
    if len(content) != entry.size:
        raise ValueError(f"the shard ends after {len(content)} of {entry.size} bytes of {entry.name}")
    return content
