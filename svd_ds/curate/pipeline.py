"""From raw videos to shards: the stages in their order.

    raw files -> probe -> cuts -> clips -> motion, text, hash, embed -> captions -> similarity      by file
              -> join -> near-duplicates -> conditions -> shards, clips.parquet, refused.csv         at the
              end

The stages by file may run on many machines at once, each over its part of the files; whoever finishes then
finds their tables, does what is missing, and writes the rest.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from svd_ds.curate import clips, cuts, measure, probe
from svd_ds.curate.clips import ClipSettings
from svd_ds.curate.cuts import CutSettings
from svd_ds.curate.pack import ShardSettings, write_shards
from svd_ds.curate.select import Clip, choose, join
from svd_ds.curate.stages import Runner, Stage
from svd_ds.data.writer import replace_file


@dataclass(frozen=True)
class Settings:
    """All that decides what the shards hold."""

    cuts: CutSettings = field(default_factory=CutSettings)
    clips: ClipSettings = field(default_factory=ClipSettings)
    shards: ShardSettings = field(default_factory=ShardSettings)
    where: tuple[str, ...] = ()
    """Conditions on the clips that are kept."""


def stages_of(settings: Settings) -> list[Stage]:
    """The stages by file, in an order in which each comes after those that it builds on."""
    probing = Stage("probe", probe.probe, probe.COLUMNS)
    cutting = Stage("cuts", cuts.find_shots, cuts.COLUMNS, settings.cuts, (probing,))
    clipping = Stage("clips", clips.cut_clips, clips.COLUMNS, settings.clips, (probing, cutting))
    motion = Stage("motion", measure.score_motion, measure.MOTION, None, (clipping,))
    return [probing, cutting, clipping, motion]


def annotate(runner: Runner, settings: Settings) -> None:
    """Run the stages by file; what is done already is not done again."""
    for stage in stages_of(settings):
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
    return [(file.name, reason) for file in runner.files for reason in reasons.get(file.name, ())]


def write_refused(runner: Runner, path: Path) -> None:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("video", "reason"), *refused(runner)])
    replace_file(path, buffer.getvalue().encode())


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)
