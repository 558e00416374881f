"""The kept clips as shards (docs/data.md), with every k-th of them held out if wanted."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svd_ds.curate.select import Clip
from svd_ds.data.motion import MotionMap
from svd_ds.data.shards import INDEX_NAME, Index
from svd_ds.data.writer import ShardWriter
from svd_ds.fsync_io import replace_bytes

SELECTION_NAME = "selection.json"
"""Beside shards: a fingerprint of what they were written of."""
HELD_OUT = "held_out"


@dataclass(frozen=True)
class ShardSettings:
    clips_per_shard: int = 16
    hold_out: float = 0.0
    """Share of the clips that goes to shards of its own, in a folder below, spread evenly."""


def write_shards(
    clips: Sequence[Clip], out: Path, folder: Path, settings: ShardSettings, each: Callable[[], None]
) -> None:
    """Write the clips to `folder`, calling `each` after each of them.

    Shards of the same selection that are there are left as they are, and gone on with where they break off.
    """
    share = settings.hold_out
    spared = [int((number + 1) * share) > int(number * share) for number in range(len(clips))]
    training = [clip for clip, is_spared in zip(clips, spared, strict=True) if not is_spared]
    held_out = [clip for clip, is_spared in zip(clips, spared, strict=True) if is_spared]
    motion_map = _write(training, out, folder, settings.clips_per_shard, each, None)
    if held_out:
        _write(held_out, out, folder / HELD_OUT, settings.clips_per_shard, each, motion_map)
    elif (folder / HELD_OUT / SELECTION_NAME).is_file():
        shutil.rmtree(folder / HELD_OUT)  # of an earlier selection: its clips are in training now


def _write(
    clips: Sequence[Clip],
    out: Path,
    folder: Path,
    per_shard: int,
    each: Callable[[], None],
    motion_map: MotionMap | None,
) -> MotionMap:
    # The name of a clip's file tells with what settings it was made.
    content = [per_shard, [(clip.id, clip.media, describe(clip)) for clip in clips]]
    selection = {"selection": hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}
    mark = folder / SELECTION_NAME
    begun = mark.is_file() and json.loads(mark.read_text()) == selection
    if begun and (folder / INDEX_NAME).is_file():
        return Index.load(folder).motion_map
    writer = ShardWriter(folder, per_shard, overwrite=True, resume=begun)
    replace_bytes(mark, json.dumps(selection).encode())
    for first in range(0, len(clips), per_shard):
        of_shard = clips[first : first + per_shard]
        adopted = writer.adopt_shard(len(of_shard))
        for clip in of_shard:
            if not adopted:
                path = out / clip.media
                writer.add(clip.id, path.suffix[1:], path.read_bytes(), describe(clip))
            each()
    return writer.close(motion_map)


def describe(clip: Clip) -> dict[str, Any]:
    """What the sample's json holds; numbers that are not known are left out."""
    annotations = {name: value for name, value in clip.annotations.items() if value is not None}
    return {
        "captions": clip.captions,
        "num_frames": clip.num_frames,
        "fps": clip.fps,
        "height": clip.height,
        "width": clip.width,
        "motion": clip.motion,
        "source": clip.video,
        "start_frame": clip.start_frame,
        "end_frame": clip.end_frame,
        **({"annotations": annotations} if annotations else {}),
        **({} if clip.elevation is None else {"elevation": clip.elevation}),
    }
