"""Copy shards with the latents of every frame beside its pixels, for training to read (docs/data.md)."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from svd_ds.data.clips import fills, read_frames
from svd_ds.data.latents import MEMBER, Origin, pack
from svd_ds.data.shards import INDEX_NAME, Index, Sample
from svd_ds.data.writer import ShardWriter, replace_file
from svd_ds.door import run_door
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.sample import frozen_folder
from svd_ds.video import from_uint8

EXAMPLE = """examples:
  python tools/encode.py data/mine data/mine-latents --size 128x160
  python -m svd_ds.train data.path=data/mine-latents data.latents=true data.crop=center

Stopped and started again, it goes on with the first shard that is not finished.
Samples that would have to be enlarged to HxW are copied without latents: training leaves them out."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
JOB_NAME = "encoding.json"
"""In OUT: what its latents are made of and by."""


def main() -> None:
    arguments = parse_arguments()
    out, (height, width) = arguments.out, arguments.size
    source = Index.load(arguments.shards)
    if out.resolve() == source.folder.resolve():
        raise ValueError(f"{out} cannot be both SHARDS and OUT")
    num_large = sum(fills((sample.height, sample.width), (height, width)) for sample in source.samples())
    if not num_large:
        raise ValueError(
            f"none of the {len(source)} samples in {source.folder} fills {height}x{width} pixels"
        )
    frozen = frozen_folder(arguments.frozen)
    dtype = PRECISIONS[arguments.precision]
    autoencoder = Autoencoder.load(frozen, arguments.device, dtype, arguments.chunk)
    autoencoder.check_size(height, width)
    origin = Origin(height, width, autoencoder.fingerprint())
    job = {"source": source.fingerprint, **asdict(origin), "precision": arguments.precision}
    begun = not arguments.overwrite and is_begun(out, job)
    if not (begun and (out / INDEX_NAME).exists()):
        largest = max(shard.num_samples for shard in source.shards)
        writer = ShardWriter(out, largest, arguments.overwrite, resume=begun)
        replace_file(out / JOB_NAME, json.dumps(job).encode())
        add_latents(source, writer, autoencoder, origin)
    num_bytes = sum(shard.num_bytes for shard in Index.load(out).shards)
    print(
        f"{out}: {len(source)} clips, {num_large} of them with latents of {height}x{width} pixels; "
        f"{num_bytes / 2**20:.1f} MiB"
    )


def is_begun(out: Path, job: dict[str, Any]) -> bool:
    """Has `out` been begun with this job? Raises ValueError, with both values, if it was with another."""
    path = out / JOB_NAME
    if not path.exists():
        return False
    there = json.loads(path.read_text())
    for name, value in job.items():
        if there[name] != value:
            raise ValueError(
                f"{out} holds latents whose {name} is {there[name]}, and here it is {value}; choose another "
                "folder, or --overwrite them"
            )
    return True


def add_latents(source: Index, writer: ShardWriter, autoencoder: Autoencoder, origin: Origin) -> None:
    """Write the shards of `source` with latents; those that an earlier start has finished are taken over."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("encoding", total=len(source))
        for _, group in groupby(source.samples(), key=lambda sample: sample.shard):
            samples = list(group)
            if writer.adopt_shard(len(samples)):
                progress.advance(task, len(samples))
                continue
            for sample in samples:
                contents = {member: source.read(sample, member) for member in sample.members}
                contents.pop(MEMBER, None)
                if fills((sample.height, sample.width), (origin.height, origin.width)):
                    contents[MEMBER] = encode(source, sample, autoencoder, origin)
                about = json.loads(contents.pop("json"))
                writer.add(sample.id, sample.media, contents.pop(sample.media), about, contents)
                progress.advance(task)
            writer.end_shard()
    writer.close(source.motion_map)


def encode(source: Index, sample: Sample, autoencoder: Autoencoder, origin: Origin) -> bytes:
    """Raises ValueError, naming shard and sample, for one that cannot be read or gives no finite latents."""
    try:
        content = source.read(sample, sample.media)
        frames_TCHW = read_frames(content, range(sample.num_frames), (origin.height, origin.width))
        return pack(autoencoder.encode(from_uint8(frames_TCHW)), origin)
    except ValueError as error:
        shard = source.folder / source.shards[sample.shard].name
        raise ValueError(f"sample {sample.id} of {shard} cannot be encoded: {error}") from error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("shards", type=Path, metavar="SHARDS", help="a folder of shards, as tools/make_shards.py writes it")
    add("out", type=Path, metavar="OUT", help="where the shards with latents go")
    add("--size", type=size, required=True, metavar="HxW", help="height and width that training will have")
    add("--frozen", default="tiny", metavar="FOLDER", help="the training's frozen.path; default: %(default)s")
    add("--precision", choices=list(PRECISIONS), default="fp32", help="default: %(default)s")
    add("--chunk", type=int, default=14, metavar="N", help="frames encoded at a time; default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--overwrite", action="store_true", help="replace the shards that OUT already holds")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


def size(text: str) -> tuple[int, int]:
    """320x576 -> (320, 576)."""
    height, width = text.split("x")
    return int(height), int(width)


if __name__ == "__main__":
    run_door(main)
