"""Raw videos to training shards: cut, measured, filtered (docs/curation.md)."""

from __future__ import annotations

import argparse
import os
from fractions import Fraction
from pathlib import Path

from rich.console import Console

from svd_ds.curate.clips import ClipSettings, count_frames
from svd_ds.curate.pack import ShardSettings
from svd_ds.curate.pipeline import Settings, annotate, finish, progress_bar, refused, write_refused
from svd_ds.curate.raw import find_raw
from svd_ds.curate.select import write_clips
from svd_ds.curate.stages import Runner
from svd_ds.door import run_door

EXAMPLE = """examples:
  python tools/curate.py raw data/curated --size 320 --where "motion>=q25" "text_area<=0.07"
  python tools/curate.py raw data/curated --part 3/8      a part of the files, on one machine of eight;
  python tools/curate.py raw data/curated                 then, once, the rest

Stopped and started again it goes on; with other settings it redoes what they change, and what follows from
that."""


def main() -> None:
    arguments = parse_arguments()
    out: Path = arguments.out
    settings = settings_of(arguments)
    console = Console(stderr=True)
    files = find_raw(arguments.raw, out)
    number, num_parts = arguments.part or (0, 1)
    with progress_bar(console) as progress:
        runner = Runner(files[number::num_parts], out, arguments.workers, progress)
        annotate(runner, settings)
        if arguments.part:
            print(f"{out}: part {number}/{num_parts} done, {len(runner.files)} of {len(files)} files")
            return
        write_refused(runner, out / "refused.csv")
        clips = finish(runner, settings, out / "shards")
    write_clips(clips, out / "clips.parquet")
    kept = [clip for clip in clips if clip.reason is None]
    print(
        f"{out}: {len(kept)} of {len(clips)} clips kept, {sum(clip.seconds for clip in kept) / 3600:.3f} of "
        f"{sum(clip.seconds for clip in clips) / 3600:.3f} hours; {len(refused(runner))} complaints about "
        f"{len(files)} files in refused.csv"
    )


def settings_of(arguments: argparse.Namespace) -> Settings:
    return Settings(
        clips=ClipSettings(
            arguments.shortest, arguments.longest, arguments.stride, arguments.size, arguments.trim
        ),
        shards=ShardSettings(arguments.clips_per_shard, arguments.hold_out),
        where=tuple(arguments.where),
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
        help="share of a clip that may be lost to cut at keyframes and copy",
    )
    add("--where", nargs="*", default=[], metavar="CONDITION", help="motion>=q25, text_area<=0.07, ...")
    add("--clips-per-shard", type=int, default=16, help="default: %(default)s")
    add("--hold-out", type=float, default=0.0, help="share of the kept clips that goes to shards/held_out")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: %(default)s")
    add(
        "--part",
        type=part,
        metavar="I/N",
        help="only the I-th of N parts of the files, I from 0; no shards yet",
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    if not 0 <= arguments.hold_out < 1:
        raise ValueError(f"--hold-out {arguments.hold_out} is no share from 0 to below 1")
    for name in ("size", "workers", "clips_per_shard"):
        if getattr(arguments, name) < (name != "size"):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)} is too small")
    for duration in filter(None, (arguments.shortest, arguments.longest, arguments.stride)):
        count_frames(duration, Fraction(1))
    return arguments


def part(text: str) -> tuple[int, int]:
    """3/8 -> (3, 8)."""
    number, num_parts = map(int, text.split("/"))
    if not 0 <= number < num_parts:
        raise argparse.ArgumentTypeError(f"part {number} is not from 0 to {num_parts - 1}")
    return number, num_parts


if __name__ == "__main__":
    run_door(main)
