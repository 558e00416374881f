"""Curate raw videos to training shards: cut, measure, caption, filter (docs/curation.md)."""

from __future__ import annotations

import argparse
import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.console import Console

from svd_ds.cli import run_cli
from svd_ds.curate.captions import PROMPTS, CaptionSettings
from svd_ds.curate.clips import ClipCutSettings, count_frames
from svd_ds.curate.duplicates import DuplicateSettings
from svd_ds.curate.embed import CLIPModelSettings
from svd_ds.curate.pack import ShardSettings
from svd_ds.curate.pipeline import (
    CurationSettings,
    annotate,
    caption_summary,
    list_refused,
    progress_bar,
    write_curated_shards,
    write_refused,
)
from svd_ds.curate.raw import find_raw_files
from svd_ds.curate.select import write_clips
from svd_ds.curate.stages import TIMEOUT, Runner
from svd_ds.curate.sweep import write_subsets
from svd_ds.curate.text import TextSettings
from svd_ds.data.filters import Condition
from svd_ds.evaluation.data_card import write_data_card

EXAMPLE = """examples:
  python tools/curate.py RAW OUT --size 320 --where "motion>=q25" "text_area<=0.07"
  python tools/curate.py RAW OUT --part 3/8      one of eight parts of the files, on one of eight machines
  python tools/curate.py RAW OUT                 afterwards, once: write the shards
  python tools/curate.py sweep-thresholds OUT    write subset configs, to compare thresholds

The same command again resumes an interrupted run. With other settings only the stages that depend on them are
repeated."""
SWEEP = "sweep-thresholds"
VIDEO_FRAMES = 8
"""Number of frames that the captioner of videos sees."""


def main() -> None:
    if SWEEP in sys.argv[1:2]:
        sweep_thresholds()
        return
    arguments = parse_arguments()
    out: Path = arguments.out
    settings = make_settings(arguments)
    console = Console(stderr=True)
    for column in settings.unmeasured_columns():
        console.print(f"{column}: not measured, because no model was given", style="yellow", highlight=False)
    files = find_raw_files(arguments.raw, out)
    index, num_parts = arguments.part or (0, 1)
    with (
        progress_bar(console) as progress,
        Runner(files[index::num_parts], out, arguments.workers, progress, arguments.timeout) as runner,
    ):
        annotate(runner, settings)
        if arguments.part:
            print(f"{out}: part {index}/{num_parts} is done, {len(runner.files)} of {len(files)} files")
            return
        write_refused(runner, out / "refused.csv")
        clips = write_curated_shards(runner, settings, out / "shards")
    write_clips(clips, out / "clips.parquet")
    write_data_card(clips, list_refused(runner), len(files), settings.unmeasured_columns(), out)
    num_kept = sum(clip.reason is None for clip in clips)
    num_refused = len(dict(list_refused(runner)))
    print(
        f"{out}: {num_kept} of {len(clips)} clips kept; {num_refused} of {len(files)} files in refused.csv; "
        f"{caption_summary(runner)}; see {out / 'report.html'}"
    )


def make_settings(arguments: argparse.Namespace) -> CurationSettings:
    """Make the settings of the curation from the command line.

    Raises:
        ValueError: --aesthetic is given without --clip, or a condition is invalid.
    """
    num_caption_frames = {"coca": 1, "video_blip": VIDEO_FRAMES, "llm": 1}
    models: dict[str, Any] = {
        name: CaptionSettings(folder, PROMPTS[name], num_frames, device=arguments.device)
        for name, num_frames in num_caption_frames.items()
        if (folder := getattr(arguments, name)) != "none"
    }
    if arguments.head and not arguments.clip:
        raise ValueError(f"--aesthetic {arguments.head} needs the embeddings of CLIP: give --clip FOLDER too")
    clip_model = CLIPModelSettings(arguments.clip, arguments.head, arguments.device)
    return CurationSettings(
        clips=ClipCutSettings(
            arguments.shortest, arguments.longest, arguments.stride, arguments.size, arguments.trim
        ),
        text=None if arguments.text_model == "none" else TextSettings(arguments.text_model or ""),
        clip_model=clip_model if arguments.clip else None,
        duplicates=None if arguments.keep_duplicates else DuplicateSettings(),
        where=tuple(Condition.parse(text, "--where") for text in arguments.where),
        shards=ShardSettings(arguments.clips_per_shard, arguments.hold_out),
        **models,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("raw", type=Path, metavar="RAW", help="a folder of videos and images, or a .txt with a path a line")
    add("out", type=Path, metavar="OUT", help="output folder of tables, shards and report")
    add("--shortest", default="2s", help="minimum clip length: 48 (frames) or 2s; default: %(default)s")
    add("--longest", default="20s", help="maximum clip length; default: %(default)s")
    add("--stride", help="distance between clip starts; default: adjacent clips")
    add("--size", type=int, default=0, help="reduce the shortest side to this many pixels; 0: keep it")
    add("--trim", type=float, default=0.25, help="share lost to copy a clip at keyframes; -1: encode all")
    add("--text-model", metavar="FILE", help="text detector: ONNX, CRAFT's .pth, or none")
    add("--clip", default="", metavar="FOLDER", help="CLIP model, for embeddings and caption similarity")
    add("--aesthetic", dest="head", default="", metavar="FILE", help="aesthetic head on CLIP's embeddings")
    add("--coca", default="none", metavar="FOLDER", help="captioner of the middle frame")
    add("--video-blip", default="none", metavar="FOLDER", help="captioner of several frames")
    add("--llm", default="none", metavar="FOLDER", help="language model that merges the two captions")
    add("--keep-duplicates", action="store_true", help="keep near-duplicates")
    add("--where", nargs="+", default=[], metavar="CONDITION", help="which clips to keep: motion>=q25, ...")
    add("--clips-per-shard", type=int, default=16, help="clips in a shard; default: %(default)s")
    add("--hold-out", type=float, default=0.0, help="share of the kept clips written to shards/held_out")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s processes")
    add("--timeout", type=float, default=TIMEOUT, metavar="S", help="seconds per file and stage: %(default)g")
    add("--device", default="cpu", help="device of CLIP and captioners; default: %(default)s")
    add("--part", type=parse_part, metavar="I/N", help="process only part I of N, from 0; writes no shards")
    add("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    if not 0 <= arguments.hold_out < 1:
        raise ValueError(f"--hold-out is {arguments.hold_out}: it must be at least 0 and below 1")
    for name, minimum in (("size", 0), ("workers", 0), ("timeout", 0.1), ("clips_per_shard", 1)):
        if (value := getattr(arguments, name)) < minimum:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least {minimum}")
    for length in filter(None, (arguments.shortest, arguments.longest, arguments.stride)):
        count_frames(length, Fraction(1))
    return arguments


def parse_part(text: str) -> tuple[int, int]:
    """Parse 3/8 to (3, 8)."""
    index, num_parts = map(int, text.split("/"))
    if not 0 <= index < num_parts:
        raise argparse.ArgumentTypeError(f"the part is {index}: it must be from 0 to {num_parts - 1}")
    return index, num_parts


def sweep_thresholds() -> None:
    """Command line of `curate.py sweep-thresholds OUT`."""
    parser = argparse.ArgumentParser(
        prog=f"curate.py {SWEEP}", description="Write configs of subsets, to compare thresholds."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a curated folder, without --where")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    out = parser.parse_args(sys.argv[2:]).out
    subsets, notes = write_subsets(out)
    for note in notes:
        Console(stderr=True).print(note, style="yellow", markup=False, highlight=False)
    for subset in subsets:
        print(f"+subset={subset.name}: {subset.num_kept} clips")
    print(f"python -m svd_ds.train --config-dir {out / 'thresholds'} +experiment=curation +subset=NAME ...")


if __name__ == "__main__":
    run_cli(main)
