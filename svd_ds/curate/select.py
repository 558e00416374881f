"""What is known of every clip, joined, and which clips are kept: conditions, and no near-duplicates.

A condition is one of `data.where`'s (svd_ds/data/filters.py): `motion>=q25`, `text_area<=0.07`. Quantiles are
those of all clips that have the number. A clip that lacks it is not kept: nothing is invented.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from svd_ds.curate.clips import COLUMNS as CUT
from svd_ds.curate.raw import RawFile
from svd_ds.curate.sidecars import FILE_NAME
from svd_ds.curate.stages import Found, sound
from svd_ds.curate.table import Row, write_parquet
from svd_ds.data.filters import Condition

ANNOTATIONS = ("text_area", "aesthetic", "clip_similarity")
"""What the stages may find beside the motion, under the names that training's filters know."""
UNREADABLE, DUPLICATE = "unreadable:", "near-duplicate:"
"""How reasons begin that are no condition's."""
CAPTION = "caption_"
"""Captioners' stages are called this and their own name."""
COLUMNS = {"id": pa.string(), "video": pa.string(), **CUT}
"""What the clips stage says of a clip; clips.parquet begins with all of it but for `media`."""


@dataclass
class Clip:
    """All that is known of a clip, and what becomes of it."""

    id: str
    video: str
    start_frame: int
    end_frame: int
    """Exclusive."""
    fps: float
    height: int
    width: int
    method: str
    """How it was cut: "copied" or "encoded"."""
    media: str
    """Path of its file below OUT."""
    motion: float | None
    annotations: dict[str, float | None]
    captions: dict[str, str]
    elevation: float | None
    hashes: list[int] = field(default_factory=list)
    embeddings: list[list[float]] = field(default_factory=list)
    duplicate_of: str | None = None
    reason: str | None = None
    """Why it is not kept; None: it is."""

    @property
    def num_frames(self) -> int:
        return self.end_frame - self.start_frame

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    def number(self, name: str) -> float | None:
        """What a condition may compare: a field of clips.parquet or an annotation; None where it is not
        known."""
        if name in ("motion", "num_frames", "fps", "height", "width", "elevation"):
            return getattr(self, name)
        return self.annotations.get(name)


def join(files: Sequence[RawFile], found: Mapping[str, Found]) -> list[Clip]:
    """The clips in the order of their files: what every stage found, and what the files' sidecars told.

    Sidecars' captions stand beside the captioners'; a sidecar's annotation fills a number that no stage
    found.
    """
    measured: dict[str, Row] = {}
    for name, of_stage in found.items():
        if name not in ("probe", "cuts", "clips"):
            for row in (row for rows in of_stage.values() for row in sound(rows)):
                found_of = measured.setdefault(row["id"], {"captions": {}})
                if name.startswith(CAPTION):
                    found_of["captions"][name.removeprefix(CAPTION)] = row["caption"]
                else:
                    found_of.update(row)
    clips = []
    for file in files:
        cut = sound(found["clips"].get(file.name, ()))
        told = json.loads(found["probe"][file.name][0]["told"]) if cut else {}
        for row in sorted(cut, key=lambda row: row["start_frame"]):
            known = measured.get(row["id"], {"captions": {}})
            written = {name: text for name, text in known["captions"].items() if text}
            # The file's name stands in for a caption only where there is no other.
            captions = {n: text for n, text in told["captions"].items() if not written or n != FILE_NAME}
            annotations = {name: known.get(name) for name in ANNOTATIONS}
            for name, value in told.get("annotations", {}).items():
                annotations[name] = value if annotations.get(name) is None else annotations[name]
            clips.append(
                Clip(
                    **{name: row[name] for name in COLUMNS},
                    motion=known.get("motion"),
                    annotations=annotations,
                    captions=captions | written,
                    elevation=told.get("elevation"),
                    hashes=known.get("hashes") or [],
                    embeddings=known.get("embeddings") or [],
                )
            )
    return clips


def choose(clips: Sequence[Clip], conditions: Sequence[Condition]) -> None:
    """Write into each clip why it is not kept, if so: the first reason, near-duplicates before conditions.

    A reason begins with what removed the clip, and a colon. Raises ValueError for a condition on a number
    that no clip has."""
    for clip in clips:
        if clip.motion is None:
            clip.reason = UNREADABLE + " its motion could not be measured"
        elif clip.duplicate_of:
            clip.reason = f"{DUPLICATE} of {clip.duplicate_of}"
    for condition in conditions:
        limit = condition.limit(clip.number(condition.name) for clip in clips)
        if limit is None:
            raise ValueError(f"the condition {condition} asks for {condition.name}, which no clip has")
        for clip in (clip for clip in clips if clip.reason is None):
            number = clip.number(condition.name)
            if number is None or math.isnan(number):
                clip.reason = f"{condition}: it has none"
            elif not condition.accepts(number, limit):
                clip.reason = f"{condition}: {number:.4g} against {limit:.4g}"


def write_clips(clips: Sequence[Clip], path: Path) -> None:
    """clips.parquet: a row a clip, kept or not."""
    names = list(dict.fromkeys(name for clip in clips for name in clip.annotations))
    cut = {name: kind for name, kind in COLUMNS.items() if name != "media"}
    columns = {
        **cut,
        **dict.fromkeys(("motion", *names), pa.float64()),
        "captions": pa.string(),
        "duplicate_of": pa.string(),
        "kept": pa.bool_(),
        "reason": pa.string(),
    }
    rows = [
        {
            **{name: getattr(clip, name) for name in (*cut, "motion", "duplicate_of", "reason")},
            **clip.annotations,
            "captions": json.dumps(clip.captions, ensure_ascii=False),
            "kept": clip.reason is None,
        }
        for clip in clips
    ]
    write_parquet(rows, columns, path)
