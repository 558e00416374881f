"""From raw videos to shards: the stages in their order.

    by file      probe -> cuts -> clips -> motion, text, hash, captions, embed -> similarity
    at the end   join -> near-duplicates -> conditions -> shards

The stages by file may run on many machines at once, each over its part of the files; whoever finishes then
finds their tables, does what is missing, and writes the rest.
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
from svd_ds.curate.clips import ClipSettings
from svd_ds.curate.cuts import CutSettings
from svd_ds.curate.duplicates import DuplicateSettings, mark_duplicates
from svd_ds.curate.embed import ClipModelSettings
from svd_ds.curate.pack import ShardSettings, write_shards
from svd_ds.curate.select import CAPTION, Clip, choose, join
from svd_ds.curate.sidecars import FILE_NAME
from svd_ds.curate.stages import Runner, Stage, sound
from svd_ds.curate.text import TextSettings
from svd_ds.data.filters import Condition
from svd_ds.fsync_io import replace_bytes


@dataclass(frozen=True)
class Settings:
    """All that decides what the shards hold. What is None is not measured."""

    cuts: CutSettings = field(default_factory=CutSettings)
    clips: ClipSettings = field(default_factory=ClipSettings)
    text: TextSettings | None = None
    clip_model: ClipModelSettings | None = None
    coca: CaptionSettings | None = None
    video_blip: CaptionSettings | None = None
    llm: CaptionSettings | None = None
    """Joins the two others' captions: needs both."""
    duplicates: DuplicateSettings | None = None
    where: tuple[Condition, ...] = ()
    """Conditions on the clips that are kept."""
    shards: ShardSettings = field(default_factory=ShardSettings)

    def __post_init__(self) -> None:
        if self.llm and not (self.coca and self.video_blip):
            raise ValueError("llm joins the captions of coca and video_blip: give both, or no llm")

    def stages(self) -> list[Stage]:
        """The stages by file, in an order in which each comes after those that it builds on."""
        probing = Stage("probe", probe.probe, probe.COLUMNS, version=3)
        cutting = Stage("cuts", cuts.find_shots, cuts.COLUMNS, self.cuts, (probing,), version=3)
        clipping = Stage("clips", clips.cut_clips, clips.COLUMNS, self.clips, (probing, cutting))
        stages = [probing, cutting, clipping]
        stages.append(Stage("motion", measure.score_motion, measure.MOTION, None, (clipping,)))
        if self.text:
            stages.append(Stage("text", text.measure_text, text.COLUMNS, self.text, (clipping,)))
        if self.duplicates:
            stages.append(Stage("hash", measure.hash_frames, measure.HASH, None, (clipping,)))
        captioning = self._captioning(clipping)
        stages += captioning
        if self.clip_model:
            model, load = self.clip_model, embed.load_clip
            embedding = Stage("embed", embed.embed, embed.EMBEDDINGS, model, (clipping,), load)
            after = (probing, embedding, *captioning)
            stages.append(embedding)
            stages.append(Stage("similarity", embed.compare, embed.SIMILARITY, model, after, load))
        return stages

    def _captioning(self, clipping: Stage) -> list[Stage]:
        stages = [
            Stage(
                CAPTION + name,
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
            stages.append(Stage(CAPTION + "llm", merging, captions.COLUMNS, self.llm, tuple(stages), load))
        return stages

    def unmeasured(self) -> list[str]:
        """Columns that stay empty, for want of a model."""
        missing = [] if self.text else ["text_area"]
        if not self.clip_model:
            missing += ["aesthetic", "clip_similarity"]
        elif not self.clip_model.head:
            missing.append("aesthetic")
        captioners = {"coca": self.coca, "video_blip": self.video_blip, "llm": self.llm}
        return missing + [f"{name} captions" for name, model in captioners.items() if not model]


def annotate(runner: Runner, settings: Settings) -> None:
    """Run the stages by file; what is done already is not done again."""
    for stage in settings.stages():
        runner.run(stage)


def finish(runner: Runner, settings: Settings, shards: Path) -> list[Clip]:
    """Choose among the clips of annotated files and write the kept ones as shards; returns all clips.

    Raises ValueError where no file gave a clip, or none is kept.
    """
    clips = join(runner.files, runner.found)
    if not clips:
        reasons = refused(runner)
        why = f", {reasons[0][0]} because {reasons[0][1]}" if reasons else ""
        raise ValueError(f"none of the {len(runner.files)} files gave a clip{why}")
    if settings.duplicates:
        mark_duplicates(clips, settings.duplicates)
    choose(clips, settings.where)
    kept = [clip for clip in clips if clip.reason is None]
    if not kept:
        raise ValueError(
            f"none of the {len(clips)} clips is kept; {clips[0].id} is not for {clips[0].reason}"
        )
    task = runner.progress.add_task("shards", total=len(kept))
    write_shards(kept, runner.out, shards, settings.shards, lambda: runner.progress.advance(task))
    return clips


def refused(runner: Runner) -> list[tuple[str, str]]:
    """Name and reason of each file that gave nothing, or not all that it should, in the order of the
    files."""
    reasons: dict[str, list[str]] = {}
    for found in runner.found.values():
        for name, rows in found.items():
            reasons.setdefault(name, []).extend(row["error"] for row in rows if row["error"])
    # Stages that read the same file may refuse it for the same reason.
    return [
        (file.name, reason) for file in runner.files for reason in dict.fromkeys(reasons.get(file.name, ()))
    ]


def captions_missing(runner: Runner) -> str:
    """How many of the readable files have no caption but their name, in words."""
    about = [json.loads(row["told"]) for rows in runner.found["probe"].values() for row in sound(rows)]
    nameless = sum(told["captions"].keys() == {FILE_NAME} for told in about)
    return f"{nameless} of {len(about)} readable files have no caption but their name"


def write_refused(runner: Runner, path: Path) -> None:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("video", "reason"), *refused(runner)])
    replace_bytes(path, buffer.getvalue().encode())


def progress_bar(console: Console | None = None) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)
