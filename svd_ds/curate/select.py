"""All results of each clip, joined, and the selection of clips by conditions and near-duplicates.

Conditions are those of `data.where` (svd_ds/data/filters.py): `motion>=q25`, `text_area<=0.07`. Quantiles are
taken over all clips that have the number. A clip that lacks the number is not kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from svd_ds.curate.clips import COLUMNS as CLIP_COLUMNS
from svd_ds.curate.raw import RawFile
from svd_ds.curate.sidecars import FILE_NAME_CAPTIONER
from svd_ds.curate.stages import RowsByFile, valid_rows
from svd_ds.curate.table import Row, write_parquet
from svd_ds.data.filters import Condition
from svd_ds.data.sample import NUMBERS
from svd_ds.scalars import SAMPLE_FIELDS

ANNOTATIONS = ("text_area", "aesthetic", "clip_similarity")
"""Measures of the stages other than motion, under the names that the conditions of training use."""
UNREADABLE, DUPLICATE = "unreadable:", "near-duplicate:"
"""Prefixes of the reasons that are not conditions."""
CAPTION_PREFIX = "caption_"
"""Prefix of the names of caption stages; the captioner's name follows."""
COLUMNS = {"id": pa.string(), "video": pa.string(), **CLIP_COLUMNS}
"""Columns of the clips stage; clips.parquet begins with all of them except `media`."""


@dataclass
class ClipRecord:
    """All results of one curated video clip, and the reason if it is not kept."""

    id: str
    video: str
    start_frame: int
    end_frame: int
    """Exclusive."""
    fps: float
    height: int
    width: int
    method: str
    """Method of cutting: "copied" or "encoded"."""
    media: str
    """Path of the clip's file, relative to OUT."""
    motion: float | None
    annotations: dict[str, float | None]
    captions: dict[str, str]
    scalars: dict[str, float] = field(default_factory=dict)
    """Field of a scalar condition (svd_ds/scalars.py) -> number, for those that its sidecar has."""
    hashes: list[int] = field(default_factory=list)
    embeddings: list[list[float]] = field(default_factory=list)
    duplicate_of: str | None = None
    reason: str | None = None
    """Reason why the clip is not kept; None if it is kept."""

    @property
    def num_frames(self) -> int:
        return self.end_frame - self.start_frame

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    def numeric_field(self, name: str) -> float | None:
        """Return the number that a condition compares: a field, scalar or annotation; None if unknown."""
        if name in NUMBERS:
            return getattr(self, name)
        return self.scalars.get(name, self.annotations.get(name))


def join_tables(files: Sequence[RawFile], results: Mapping[str, RowsByFile]) -> list[ClipRecord]:
    """Join the results of all stages and the files' sidecars to one record a clip, in the order of the files.

    Captions of sidecars are added to those of the captioners; an annotation of a sidecar is used if no stage
    measured it.
    """
    measured: dict[str, Row] = {}
    for name, rows_by_file in results.items():
        if name not in ("probe", "cuts", "clips"):
            for row in (row for rows in rows_by_file.values() for row in valid_rows(rows)):
                values = measured.setdefault(row["id"], {"captions": {}})
                if name.startswith(CAPTION_PREFIX):
                    values["captions"][name.removeprefix(CAPTION_PREFIX)] = row["caption"]
                else:
                    values.update(row)
    clips = []
    for file in files:
        cut = valid_rows(results["clips"].get(file.name, ()))
        metadata = json.loads(results["probe"][file.name][0]["metadata"]) if cut else {}
        for row in sorted(cut, key=lambda row: row["start_frame"]):
            values = measured.get(row["id"], {"captions": {}})
            generated = {name: text for name, text in values["captions"].items() if text}
            # The file name counts as a caption only if there is no other.
            own = metadata["captions"].items()
            captions = {n: text for n, text in own if not generated or n != FILE_NAME_CAPTIONER}
            annotations = {name: values.get(name) for name in ANNOTATIONS}
            for name, value in metadata.get("annotations", {}).items():
                annotations[name] = value if annotations.get(name) is None else annotations[name]
            clips.append(
                ClipRecord(
                    **{name: row[name] for name in COLUMNS},
                    motion=values.get("motion"),
                    annotations=annotations,
                    captions=captions | generated,
                    scalars={name: metadata[name] for name in SAMPLE_FIELDS if name in metadata},
                    hashes=values.get("hashes") or [],
                    embeddings=values.get("embeddings") or [],
                )
            )
    return clips


def apply_conditions(clips: Sequence[ClipRecord], conditions: Sequence[Condition]) -> None:
    """Set the `reason` of each clip that is not kept: near-duplicates first, then the conditions in order.

    A reason begins with the name of the filter and a colon.

    Raises:
        ValueError: a condition needs a number that no clip has.
    """
    for clip in clips:
        if clip.motion is None:
            clip.reason = UNREADABLE + " its motion could not be measured"
        elif clip.duplicate_of:
            clip.reason = f"{DUPLICATE} of {clip.duplicate_of}"
    for condition in conditions:
        limit = condition.limit(clip.numeric_field(condition.name) for clip in clips)
        if limit is None:
            raise ValueError(f"the condition {condition} asks for {condition.name}, which no clip has")
        for clip in (clip for clip in clips if clip.reason is None):
            number = clip.numeric_field(condition.name)
            if number is None or math.isnan(number):
                clip.reason = f"{condition}: it has no {condition.name}"
            elif not condition.accepts(number, limit):
                clip.reason = f"{condition}: {number:.4g}, but the limit is {limit:.4g}"


def write_clips(clips: Sequence[ClipRecord], path: Path) -> None:
    """Write clips.parquet: one row a clip, kept or not."""
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
