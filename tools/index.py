"""Write the index of existing WebDataset shards, so that training reads them in place (docs/data.md)."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import track

from svd_ds.cli import run_cli
from svd_ds.curate.flow import video_motion_score
from svd_ds.data.external_shards import BAD_ANNOTATIONS, NO_CAPTION, NOT_UTF8, SEVERAL_MEDIA
from svd_ds.data.folders import INDEX_NAME
from svd_ds.data.indexing import ProbedFolder, index_folder
from svd_ds.data.quarantine import REFUSED
from svd_ds.data.sidecar import clean_text

EXAMPLE = """examples:
  python tools/index.py /data/webvid
  python -m svd_ds.train data.path=/data/webvid
  python tools/index.py /readonly/webvid --out /data/webvid-index
  python -m svd_ds.train data.path=/data/webvid-index

A sample is a video or an image (mp4, mov, mkv, webm, avi, m4v, jpg, jpeg, png, webp) and a caption: a text
file with the same key (txt, text, caption, prompt), or in a JSON file "captions" by name, "caption", "text",
"prompt", "title" or "description". The files of a sample share the name up to its first dot, in any order in
the tar. NAME.mp4 is preferred to NAME.rgb.mp4, and NAME.json to NAME.mp4.json.

The command writes index.jsonl, and refused.csv with the reason for each sample that cannot be used, to FOLDER
or the folder --out. It resumes if it is started again after a stop."""


def main() -> None:
    arguments = parse_arguments()
    out: Path = arguments.out or arguments.folder
    motion = video_motion_score if arguments.motion else None
    found = index_folder(arguments.folder, out, motion, arguments.overwrite, show_progress)
    print(clean_text(summary(found, out)))


def show_progress(names: list[str]) -> Iterable[str]:
    """Iterate over the names of the shards with a progress bar on stderr."""
    return track(names, "indexing", console=Console(stderr=True))


def summary(found: ProbedFolder, out: Path) -> str:
    """Summarize the index: a line of totals, and a line for each kind of remark."""
    num_samples, notes = len(found.samples), found.notes
    where = f": {out / REFUSED} says why" if found.faults else ""
    lines = [
        f"{out / INDEX_NAME}: {num_samples} samples in {len(found.shards)} shards; "
        f"{len(found.faults)} refused{where}"
    ]
    sentences = {
        NO_CAPTION: "of {all} samples have no caption, which text-to-video needs",
        NOT_UTF8: "of {all} samples have a caption that is not UTF-8: read as Windows-1252 or UTF-16",
        SEVERAL_MEDIA: "of {all} samples have several videos or images: see --help for which one is used",
        BAD_ANNOTATIONS: "annotations are not finite numbers, and are left out",
    }
    lines += [
        f"{notes[note]} {text.format(all=num_samples)}" for note, text in sentences.items() if notes[note]
    ]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="folder of .tar shards at any depth; links are followed")
    add("--out", type=Path, metavar="OUT", help="folder of the index; default: FOLDER")
    add(
        "--no-motion",
        dest="motion",
        action="store_false",
        help="leave motion scores at 0; much faster",
    )
    add("--overwrite", action="store_true", help="replace an existing index")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
