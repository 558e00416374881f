"""The kept clips as shards (docs/data.md), with an optional held-out fraction."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svd_ds.curate.select import ClipRecord
from svd_ds.data.motion import MotionMap
from svd_ds.data.shards import INDEX_NAME, Index
from svd_ds.data.writer import ShardWriter
from svd_ds.fsync_io import replace_bytes

SELECTION_NAME = "selection.json"
"""File in the folder of shards with a fingerprint of the clips that they were written from."""
HELD_OUT = "held_out"


@dataclass(frozen=True)
class ShardSettings:
    """Size of shards and of the held-out set."""

    clips_per_shard: int = 16
    hold_out: float = 0.0
    """Fraction of the clips that is written to separate shards in a subfolder, evenly spaced."""


def write_shards(
    clips: Sequence[ClipRecord], out: Path, folder: Path, settings: ShardSettings, on_clip: Callable[[], None]
) -> None:
    """Write the clips to shards in `folder`, calling `on_clip` after each.

    Existing shards of the same selection are kept, and an interrupted run is resumed.
    """
    share = settings.hold_out
    is_held_out = [int((number + 1) * share) > int(number * share) for number in range(len(clips))]
    training = [clip for clip, is_held in zip(clips, is_held_out, strict=True) if not is_held]
    held_out = [clip for clip, is_held in zip(clips, is_held_out, strict=True) if is_held]
    motion_map = _write_split(training, out, folder, settings.clips_per_shard, on_clip, None)
    if held_out:
        _write_split(held_out, out, folder / HELD_OUT, settings.clips_per_shard, on_clip, motion_map)
    elif (folder / HELD_OUT / SELECTION_NAME).is_file():
        shutil.rmtree(folder / HELD_OUT)  # left by an earlier selection: its clips are training clips now


def _write_split(
    clips: Sequence[ClipRecord],
    out: Path,
    folder: Path,
    per_shard: int,
    on_clip: Callable[[], None],
    motion_map: MotionMap | None,
) -> MotionMap:
    # The path of a clip's file contains the fingerprint of the settings that it was made with.
    content = [per_shard, [(clip.id, clip.media, sample_json(clip)) for clip in clips]]
    selection = {"selection": hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}
    selection_file = folder / SELECTION_NAME
    is_resumed = selection_file.is_file() and json.loads(selection_file.read_text()) == selection
    if is_resumed and (folder / INDEX_NAME).is_file():
        return Index.load(folder).motion_map
    writer = ShardWriter(folder, per_shard, overwrite=True, resume=is_resumed)
    replace_bytes(selection_file, json.dumps(selection).encode())
    for first in range(0, len(clips), per_shard):
        shard_clips = clips[first : first + per_shard]
        is_written = writer.adopt_shard(len(shard_clips))
        for clip in shard_clips:
            if not is_written:
                path = out / clip.media
                writer.add(clip.id, path.suffix[1:], path.read_bytes(), sample_json(clip))
            on_clip()
    return writer.close(motion_map)


def sample_json(clip: ClipRecord) -> dict[str, Any]:
    """Return the content of the sample's json; unknown numbers are omitted."""
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
        **clip.scalars,
    }
