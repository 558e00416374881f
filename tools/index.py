"""Write the index of foreign WebDataset shards, so that training reads them where they are (docs/data.md)."""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import track

from svd_ds.curate.flow import motion_score
from svd_ds.data.foreign import samples_in
from svd_ds.data.motion import MotionMap
from svd_ds.data.quarantine import Fault
from svd_ds.data.shards import INDEX_NAME, Sample, Shard, parse_sample
from svd_ds.data.writer import replace_file, write_index
from svd_ds.door import run_door

EXAMPLE = """example:
  python tools/index.py /data/webvid
  python -m svd_ds.train data.path=/data/webvid

A sample is a video or an image (mp4, mov, mkv, webm, avi, m4v, jpg, jpeg, png, webp) and a caption: a text
beside it (txt, text, caption), or in a json as "captions" by name, "caption", "text" or "prompt". FOLDER gets
index.jsonl, and refused.csv: what cannot be used, and why. Stopped and started again, it goes on where it
was."""

PARTS = ".index-parts"
"""In FOLDER, while it is at work: what was found in each shard."""


def main() -> None:
    arguments = parse_arguments()
    folder: Path = arguments.folder
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.tar"))
    if not names:
        raise ValueError(f"there is no .tar in {folder}")
    if (folder / INDEX_NAME).exists() and not arguments.overwrite:
        raise ValueError(f"{folder} has an {INDEX_NAME}; --overwrite it")
    parts = folder / PARTS
    if arguments.overwrite:
        shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(exist_ok=True)
    samples: list[Sample] = []
    shards: list[Shard] = []
    faults: list[Fault] = []
    motion = motion_score if arguments.motion else None
    for number, name in enumerate(track(names, "indexing", console=Console(stderr=True))):
        part = parts / f"{number:06d}.jsonl"
        if not part.exists():
            found = samples_in(folder / name, name, number, motion)
            lines = [json.dumps([isinstance(item, Sample), asdict(item)]) for item in found]
            replace_file(part, "".join(f"{line}\n" for line in lines).encode())
        items = [json.loads(line) for line in part.read_text().splitlines()]
        of_shard = [parse_sample(fields) for usable, fields in items if usable]
        faults += [Fault(**fields) for usable, fields in items if not usable]
        samples += of_shard
        shards.append(Shard(name, (folder / name).stat().st_size, len(of_shard)))
    write_refused(folder / "refused.csv", faults)
    if not samples:
        raise ValueError(f"none of the samples in {folder} can be used: {folder / 'refused.csv'} says why")
    scores = [sample.motion for sample in samples if sample.num_frames > 1]
    write_index(folder, shards, samples, MotionMap.calibrate(scores))
    shutil.rmtree(parts)
    print(f"{folder / INDEX_NAME}: {len(samples)} samples in {len(shards)} shards; {len(faults)} refused")


def write_refused(path: Path, faults: list[Fault]) -> None:
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("sample", "shard", "reason"))
        table.writerows((fault.id, fault.shard, fault.cause) for fault in faults)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="of .tar shards, in any depth")
    add(
        "--no-motion",
        dest="motion",
        action="store_false",
        help="leave motion scores at 0: nothing is decoded whole",
    )
    add("--overwrite", action="store_true", help="replace the index that is there")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


if __name__ == "__main__":
    run_door(main)
