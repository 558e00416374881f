"""Curation pipeline: from raw videos to shards, stage by stage.

    per file     probe -> cuts -> clips -> motion, text, hash, captions, embed -> similarity
    at the end   join tables -> near-duplicates -> conditions -> shards

The per-file stages may run on many machines at once, each on its part of the files. A final run on all files
finds their tables, processes what is missing, and writes the rest.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from svd_ds.curate import captions, clips, cuts, embed, measure, probe, text
from svd_ds.curate.captions import CaptionSettings
from svd_ds.curate.clips import ClipCutSettings
from svd_ds.curate.cuts import CutSettings
from svd_ds.curate.duplicates import DuplicateSettings, mark_duplicates
from svd_ds.curate.embed import CLIPModelSettings
from svd_ds.curate.pack import ShardSettings, write_shards
from svd_ds.curate.select import CAPTION_PREFIX, ClipRecord, apply_conditions, join_tables
from svd_ds.curate.sidecars import FILE_NAME_CAPTIONER
from svd_ds.curate.stages import Runner, Stage, valid_rows
from svd_ds.curate.text import TextSettings
from svd_ds.data.filters import Condition
from svd_ds.fsync_io import replace_bytes


@dataclass(frozen=True)
class CurationSettings:
    """Settings that determine the content of the shards. A measure whose settings are None is not taken."""

    cuts: CutSettings = field(default_factory=CutSettings)
    clips: ClipCutSettings = field(default_factory=ClipCutSettings)
    text: TextSettings | None = None
    clip_model: CLIPModelSettings | None = None
    coca: CaptionSettings | None = None
    video_blip: CaptionSettings | None = None
    llm: CaptionSettings | None = None
    """Settings of the model that merges the captions of coca and video_blip; requires both."""
    duplicates: DuplicateSettings | None = None
    where: tuple[Condition, ...] = ()
    """Conditions that the kept clips meet."""
    shards: ShardSettings = field(default_factory=ShardSettings)

    def __post_init__(self) -> None:
        if self.llm and not (self.coca and self.video_blip):
            raise ValueError("llm merges the captions of coca and video_blip: give both models, or no llm")

    def stages(self) -> list[Stage]:
        """List the per-file stages, each after the stages that it depends on."""
        probing = Stage("probe", probe.probe, probe.COLUMNS, version=4)
        cutting = Stage("cuts", cuts.find_shots, cuts.COLUMNS, self.cuts, (probing,), version=3)
        clipping = Stage("clips", clips.cut_clips, clips.COLUMNS, self.clips, (probing, cutting))
        stages = [probing, cutting, clipping]
        stages.append(Stage("motion", measure.score_motion, measure.MOTION, None, (clipping,)))
        if self.text:
            stages.append(Stage("text", text.measure_text, text.COLUMNS, self.text, (clipping,)))
        if self.duplicates:
            stages.append(Stage("hash", measure.hash_frames, measure.HASH, None, (clipping,)))
        caption_stages = self._caption_stages(clipping)
        stages += caption_stages
        if self.clip_model:
            settings, load = self.clip_model, embed.load_clip_model
            embedding = Stage("embed", embed.embed_frames, embed.EMBEDDINGS, settings, (clipping,), load)
            earlier = (probing, embedding, *caption_stages)
            stages.append(embedding)
            stages.append(
                Stage("similarity", embed.score_captions, embed.SIMILARITY, settings, earlier, load)
            )
        return stages

    def _caption_stages(self, clipping: Stage) -> list[Stage]:
        stages = [
            Stage(
                CAPTION_PREFIX + name,
                captions.caption_frames,
                captions.COLUMNS,
                model,
                (clipping,),
                captions.load_captioner,
            )
            for name, model in (("coca", self.coca), ("video_blip", self.video_blip))
            if model
        ]
        if self.llm:
            merging, load = captions.merge_captions, captions.load_merger
            stages.append(
                Stage(CAPTION_PREFIX + "llm", merging, captions.COLUMNS, self.llm, tuple(stages), load)
            )
        return stages

    def unmeasured_columns(self) -> list[str]:
        """List the columns that stay empty because no model was given."""
        missing = [] if self.text else ["text_area"]
        if not self.clip_model:
            missing += ["aesthetic", "clip_similarity"]
        elif not self.clip_model.aesthetic_head:
            missing.append("aesthetic")
        captioners = {"coca": self.coca, "video_blip": self.video_blip, "llm": self.llm}
        return missing + [f"{name} captions" for name, model in captioners.items() if not model]


def annotate(runner: Runner, settings: CurationSettings) -> None:
    """Run the per-file stages; files that are done are skipped."""
    for stage in settings.stages():
        runner.run(stage)


def write_curated_shards(runner: Runner, settings: CurationSettings, shards: Path) -> list[ClipRecord]:
    """Select clips of annotated files and write the kept ones as shards.

    Returns:
        All clips, each with the reason if it is not kept.

    Raises:
        ValueError: no file gave a clip, or no clip is kept.
    """
    clips = join_tables(runner.files, runner.results)
    if not clips:
        reasons = list_refused(runner)
        example = f", {reasons[0][0]} because {reasons[0][1]}" if reasons else ""
        raise ValueError(f"none of the {len(runner.files)} files gave a clip{example}")
    if settings.duplicates:
        mark_duplicates(clips, settings.duplicates)
    apply_conditions(clips, settings.where)
    kept = [clip for clip in clips if clip.reason is None]
    if not kept:
        raise ValueError(
            f"none of the {len(clips)} clips is kept; the reason of {clips[0].id} is {clips[0].reason}"
        )
    task = runner.progress.add_task("shards", total=len(kept))
    write_shards(kept, runner.out, shards, settings.shards, lambda: runner.progress.advance(task))
    return clips


def list_refused(runner: Runner) -> list[tuple[str, str]]:
    """List (file name, reason) of each file that gave no clips, or fewer than it should, in the order of the
    files."""
    reasons: dict[str, list[str]] = {}
    for rows_by_file in runner.results.values():
        for name, rows in rows_by_file.items():
            reasons.setdefault(name, []).extend(row["error"] for row in rows if row["error"])
    # Several stages may refuse a file for the same reason: it is listed once.
    return [
        (file.name, reason) for file in runner.files for reason in dict.fromkeys(reasons.get(file.name, ()))
    ]


def caption_summary(runner: Runner) -> str:
    """Return a sentence with the number of readable files whose only caption is their name."""
    probed = runner.results["probe"].values()
    metadata = [json.loads(row["metadata"]) for rows in probed for row in valid_rows(rows)]
    num_uncaptioned = sum(each["captions"].keys() == {FILE_NAME_CAPTIONER} for each in metadata)
    return f"{num_uncaptioned} of {len(metadata)} readable files have no caption but their name"


def write_refused(runner: Runner, path: Path) -> None:
    """Write refused.csv: the refused files and the reasons."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("video", "reason"), *list_refused(runner)])
    replace_bytes(path, buffer.getvalue().encode())


def progress_bar(console: Console | None = None) -> Progress:
    """Make progress bars with counts and the remaining time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)
