"""Raw videos to training shards: cut, measured, captioned, filtered (docs/curation.md)."""

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
from svd_ds.curate.clips import ClipSettings, count_frames
from svd_ds.curate.duplicates import DuplicateSettings
from svd_ds.curate.embed import ClipModelSettings
from svd_ds.curate.pack import ShardSettings
from svd_ds.curate.pipeline import (
    Settings,
    annotate,
    captions_missing,
    finish,
    progress_bar,
    refused,
    write_refused,
)
from svd_ds.curate.raw import find_raw
from svd_ds.curate.select import write_clips
from svd_ds.curate.stages import TIMEOUT, Runner
from svd_ds.curate.sweep import write_subsets
from svd_ds.curate.text import TextSettings
from svd_ds.data.filters import Condition
from svd_ds.evaluation.data_card import write_card

EXAMPLE = """examples:
  python tools/curate.py RAW OUT --size 320 --where "motion>=q25" "text_area<=0.07"
  python tools/curate.py RAW OUT --part 3/8      a part of the files, on one machine of eight;
  python tools/curate.py RAW OUT                 then, once, the rest
  python tools/curate.py sweep-thresholds OUT    configs of subsets, to find out which thresholds serve best

Stopped and started again it goes on; with other settings it redoes what they change, and what follows from
that."""
SWEEP = "sweep-thresholds"
VIDEO_FRAMES = 8
"""That a captioner of videos sees."""


def main() -> None:
    if SWEEP in sys.argv[1:2]:
        sweep_thresholds()
        return
    arguments = parse_arguments()
    out: Path = arguments.out
    settings = settings_of(arguments)
    console = Console(stderr=True)
    for column in settings.unmeasured():
        console.print(f"{column}: not measured, no model was given", style="yellow", highlight=False)
    files = find_raw(arguments.raw, out)
    number, num_parts = arguments.part or (0, 1)
    with (
        progress_bar(console) as progress,
        Runner(files[number::num_parts], out, arguments.workers, progress, arguments.timeout) as runner,
    ):
        annotate(runner, settings)
        if arguments.part:
            print(f"{out}: part {number}/{num_parts} is done, {len(runner.files)} of {len(files)} files")
            return
        write_refused(runner, out / "refused.csv")
        clips = finish(runner, settings, out / "shards")
    write_clips(clips, out / "clips.parquet")
    write_card(clips, refused(runner), len(files), settings.unmeasured(), out)
    num_kept = sum(clip.reason is None for clip in clips)
    num_refused = len(dict(refused(runner)))
    print(
        f"{out}: {num_kept} of {len(clips)} clips kept; {num_refused} of {len(files)} files in refused.csv; "
        f"{captions_missing(runner)}; see {out / 'report.html'}"
    )


def settings_of(arguments: argparse.Namespace) -> Settings:
    a = arguments
    several = {"coca": 1, "video_blip": VIDEO_FRAMES, "llm": 1}
    models: dict[str, Any] = {
        name: CaptionSettings(folder, PROMPTS[name], num_frames, device=a.device)
        for name, num_frames in several.items()
        if (folder := getattr(a, name)) != "none"
    }
    if a.head and not a.clip:
        raise ValueError(f"--aesthetic {a.head} scores embeddings: give --clip FOLDER too")
    return Settings(
        clips=ClipSettings(a.shortest, a.longest, a.stride, a.size, a.trim),
        text=None if a.text_model == "none" else TextSettings(a.text_model or ""),
        clip_model=ClipModelSettings(a.clip, a.head, a.device) if a.clip else None,
        duplicates=None if a.keep_duplicates else DuplicateSettings(),
        where=tuple(Condition.parse(text, "--where") for text in a.where),
        shards=ShardSettings(a.clips_per_shard, a.hold_out),
        **models,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("raw", type=Path, metavar="RAW", help="a folder of videos and images, or a .txt with a path a line")
    add("out", type=Path, metavar="OUT", help="where tables, shards and report go")
    add("--shortest", default="2s", help="clip: frames (48) or seconds; default: %(default)s")
    add("--longest", default="20s", help="clip; a longer shot gives several; default: %(default)s")
    add("--stride", help="from one clip's start to the next's; default: clips follow each other")
    add("--size", type=int, default=0, help="reduce the shortest side to so many pixels; 0 keeps it")
    add(
        "--trim",
        type=float,
        default=0.25,
        help="share that a clip may lose to be copied, not encoded; -1: never",
    )
    add("--text-model", metavar="FILE", help="of text: ONNX, CRAFT's .pth, or none; default: rapidocr's")
    add("--clip", default="", metavar="FOLDER", help="CLIP: embeddings, and how well captions fit")
    add("--aesthetic", dest="head", default="", metavar="FILE", help="linear head on CLIP's embeddings")
    add("--coca", default="none", metavar="FOLDER", help="captions the middle frame; default: %(default)s")
    add("--video-blip", default="none", metavar="FOLDER", help="captions the clip; default: %(default)s")
    add("--llm", default="none", metavar="FOLDER", help="joins those two captions; default: %(default)s")
    add("--keep-duplicates", action="store_true", help="do not look for near-duplicates")
    add("--where", nargs="+", default=[], metavar="CONDITION", help="motion>=q25, text_area<=0.07, ...")
    add("--clips-per-shard", type=int, default=16, help="default: %(default)s")
    add("--hold-out", type=float, default=0.0, help="share of the kept clips that goes to shards/held_out")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: %(default)s")
    add(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="S",
        help="seconds a stage gives a file: %(default)g",
    )
    add("--device", default="cpu", help="of CLIP and captioners; default: %(default)s")
    add("--part", type=part, metavar="I/N", help="only the I-th of N parts, I from 0; writes no shards")
    add("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    if not 0 <= arguments.hold_out < 1:
        raise ValueError(f"--hold-out {arguments.hold_out} is no share from 0 to below 1")
    for name, least in (("size", 0), ("workers", 0), ("timeout", 0.1), ("clips_per_shard", 1)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)} is less than {least}")
    for duration in filter(None, (arguments.shortest, arguments.longest, arguments.stride)):
        count_frames(duration, Fraction(1))
    return arguments


def part(text: str) -> tuple[int, int]:
    """3/8 -> (3, 8)."""
    number, num_parts = map(int, text.split("/"))
    if not 0 <= number < num_parts:
        raise argparse.ArgumentTypeError(f"part {number} is not from 0 to {num_parts - 1}")
    return number, num_parts


def sweep_thresholds() -> None:
    parser = argparse.ArgumentParser(prog=f"curate.py {SWEEP}", description="Configs of subsets.")
    parser.add_argument("out", type=Path, metavar="OUT", help="curated without --where")
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
