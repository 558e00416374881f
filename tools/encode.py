"""Copy shards with what training needs of the frozen networks beside the pixels: every frame's latents, and
CLIP's states of frames and captions (docs/cache.md)."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from svd_ds.cli import run_cli
from svd_ds.data.clip_embeddings import EmbeddingsOrigin
from svd_ds.data.clips import covers
from svd_ds.data.latents import MEMBER, LatentsOrigin
from svd_ds.data.quarantine import REFUSED, Quarantine
from svd_ds.data.shards import INDEX_NAME, Index
from svd_ds.encoding import (
    Encoders,
    begin,
    count_uncaptioned,
    encode_shards,
    finish,
    note_refused,
)
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.clip_encoders import ImageEncoder, TextEncoder
from svd_ds.model.frozen import fingerprint
from svd_ds.parallel.env import Env
from svd_ds.sample import frozen_folder

EXAMPLE = """examples:
  python tools/encode.py data/mine data/mine-latents --size 128x160
  srun python tools/encode.py data/mine data/mine-latents --size 320x576 --frozen FOLDER
  python -m svd_ds.train data.path=data/mine-latents data.latents=true data.crop=center

Under srun, torchrun or tools/launch.py the ranks share out the shards. Stopped and started again, on as many
ranks or not, it goes on with the shards that are not finished. Samples that would have to be enlarged to HxW
are copied without latents: training leaves them out. Those that cannot be read, or whose lines of the index
are damaged, are left out and listed in OUT/refused.csv."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    env = Env.read()
    env.check_gpus()
    arguments = parse_arguments(env)
    out = arguments.out
    loaded = Index.load(arguments.shards)
    refused = Quarantine(arguments.max_refused, len(loaded), key="--max-refused")
    source, faults = loaded.drop_damaged(refused)
    if out.resolve() == arguments.shards.resolve():
        raise ValueError(f"{out} cannot be both SHARDS and OUT")
    num_large = sum(covers((sample.height, sample.width), arguments.size) for sample in source.samples())
    if not num_large:
        height, width = arguments.size
        raise ValueError(
            f"none of the {len(source)} samples in {arguments.shards} fills {height}x{width} pixels"
        )
    encoders = load_encoders(arguments)
    origins = asdict(encoders.origin) | asdict(encoders.embeddings_origin)
    job = {"source": source.fingerprint, **origins, "precision": arguments.precision}
    begin(out, job, arguments.overwrite)
    if not (out / INDEX_NAME).exists():
        if env.rank == 0:
            note_refused(out, faults)
        write_shards(source, out, encoders, env, refused)
    if finish(source, out):
        print(summary(out, len(loaded), encoders))


def summary(out: Path, num_given: int, encoders: Encoders) -> str:
    """What was made of `num_given` samples, and a line about each thing that the user should know of it."""
    made = Index.load(out)
    num_encoded = sum(MEMBER in sample.members for sample in made.samples())
    num_bytes = sum(shard.num_bytes for shard in made.shards)
    lines = [
        f"{out}: {len(made)} clips, {num_encoded} of them with latents of {encoders.origin.height}x"
        f"{encoders.origin.width} pixels; {num_bytes / 2**20:.1f} MiB"
    ]
    if num_lost := num_given - len(made):
        lines.append(f"{num_lost} of {num_given} samples cannot be read: {out / REFUSED} says why")
    if num_uncaptioned := count_uncaptioned(made):
        lines.append(f"{num_uncaptioned} of {len(made)} clips have no caption, which text-to-video needs")
    return "\n".join(lines)


def write_shards(source: Index, out: Path, encoders: Encoders, env: Env, refused: Quarantine) -> None:
    """This rank's; rank 0 shows how far it is with its own."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=env.rank > 0) as progress:
        mine = source.shard_sizes[env.rank :: env.world]
        task = progress.add_task("encoding", total=sum(mine))
        advance = partial(progress.advance, task)
        encode_shards(source, out, encoders, env.rank, env.world, refused, advance)


def load_encoders(arguments: argparse.Namespace) -> Encoders:
    """The autoencoder, and those of CLIP's encoders that FOLDER has and that are wanted."""
    folder, dtype = frozen_folder(arguments.frozen), PRECISIONS[arguments.precision]
    autoencoder = Autoencoder.load(folder, arguments.device, dtype, arguments.chunk)
    autoencoder.check_size(*arguments.size)
    height, width = arguments.size
    image_of, text_of = (
        fingerprint(folder, part) if arguments.clip else None for part in ("image_encoder", "text_encoder")
    )
    return Encoders(
        autoencoder=autoencoder,
        image=ImageEncoder.load(folder, arguments.device, dtype) if image_of else None,
        text=TextEncoder.load(folder, arguments.device, dtype) if text_of else None,
        origin=LatentsOrigin(height, width, autoencoder.fingerprint()),
        embeddings_origin=EmbeddingsOrigin(height, width, image_of, text_of),
    )


def parse_arguments(env: Env) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("shards", type=Path, metavar="SHARDS", help="a folder of shards, as tools/make_shards.py writes it")
    add("out", type=Path, metavar="OUT", help="where the shards with latents go")
    add("--size", type=size, required=True, metavar="HxW", help="height and width that training will have")
    add("--frozen", default="tiny", metavar="FOLDER", help="the training's frozen.path; default: %(default)s")
    add("--no-clip", dest="clip", action="store_false", help="make latents alone, and no states of CLIP")
    add("--precision", choices=list(PRECISIONS), default="fp32", help="default: %(default)s")
    add("--chunk", type=int, default=14, metavar="N", help="frames encoded at once; default: %(default)s")
    add("--device", default=str(env.device), help="default: %(default)s")
    add(
        "--max-refused",
        type=float,
        default=0.01,
        metavar="S",
        help="share that may be unreadable; %(default)s",
    )
    add("--overwrite", action="store_true", help="replace the shards that OUT already holds; with one rank")
    add("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    if arguments.overwrite and env.world > 1:
        raise ValueError(
            f"--overwrite is for one rank, and here are {env.world}: remove {arguments.out} first"
        )
    return arguments


def size(text: str) -> tuple[int, int]:
    """320x576 -> (320, 576)."""
    height, width = text.split("x")
    return int(height), int(width)


if __name__ == "__main__":
    run_cli(main)
