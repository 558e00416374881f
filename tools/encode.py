"""Copy shards and add the outputs of the frozen networks: latents of every frame, and CLIP embeddings of
frames and captions (docs/cache.md)."""

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
    append_refused,
    count_uncaptioned,
    encode_shards,
    prepare_output,
    write_index_if_complete,
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

Under srun, torchrun or tools/launch.py the ranks share the shards. The same command again, on any number of
ranks, resumes with the unfinished shards. Samples smaller than HxW are copied without latents, and training
skips them. Samples that cannot be read, or whose index lines are damaged, are left out and listed in
OUT/refused.csv."""

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
        raise ValueError(f"SHARDS and OUT are both {out}: choose another folder for OUT")
    num_large = sum(covers((sample.height, sample.width), arguments.size) for sample in source.samples())
    if not num_large:
        height, width = arguments.size
        raise ValueError(
            f"none of the {len(source)} samples in {arguments.shards} is as large as {height}x{width} pixels"
        )
    encoders = load_encoders(arguments)
    origins = asdict(encoders.origin) | asdict(encoders.embeddings_origin)
    settings = {"source": source.fingerprint, **origins, "precision": arguments.precision}
    prepare_output(out, settings, arguments.overwrite)
    if not (out / INDEX_NAME).exists():
        if env.rank == 0:
            append_refused(out, faults)
        write_rank_shards(source, out, encoders, env, refused)
    if write_index_if_complete(source, out):
        print(summary(out, len(loaded), encoders))


def summary(out: Path, num_samples: int, encoders: Encoders) -> str:
    """Return a summary of the encoded shards in one or several lines.

    Args:
        out: folder of the encoded shards.
        num_samples: number of samples in the source, damaged ones included.
        encoders: the frozen networks.
    """
    encoded = Index.load(out)
    num_encoded = sum(MEMBER in sample.members for sample in encoded.samples())
    num_bytes = sum(shard.num_bytes for shard in encoded.shards)
    lines = [
        f"{out}: {len(encoded)} clips, {num_encoded} of them with latents of {encoders.origin.height}x"
        f"{encoders.origin.width} pixels; {num_bytes / 2**20:.1f} MiB"
    ]
    if num_refused := num_samples - len(encoded):
        lines.append(f"{num_refused} of {num_samples} samples cannot be read: {out / REFUSED} says why")
    if num_uncaptioned := count_uncaptioned(encoded):
        lines.append(f"{num_uncaptioned} of {len(encoded)} clips have no caption, which text-to-video needs")
    return "\n".join(lines)


def write_rank_shards(source: Index, out: Path, encoders: Encoders, env: Env, refused: Quarantine) -> None:
    """Write this rank's shards; rank 0 shows the progress of its own."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=env.rank > 0) as progress:
        shard_sizes = source.shard_sizes[env.rank :: env.world]
        task = progress.add_task("encoding", total=sum(shard_sizes))
        advance = partial(progress.advance, task)
        encode_shards(source, out, encoders, env.rank, env.world, refused, advance)


def load_encoders(arguments: argparse.Namespace) -> Encoders:
    """Load the autoencoder, and the CLIP encoders that the frozen folder has, unless --no-clip is given."""
    folder, dtype = frozen_folder(arguments.frozen), PRECISIONS[arguments.precision]
    height, width = arguments.size
    autoencoder = Autoencoder.load(folder, arguments.device, dtype, arguments.chunk)
    autoencoder.check_size(*arguments.size)
    image_fingerprint, text_fingerprint = (
        fingerprint(folder, part) if arguments.clip else None for part in ("image_encoder", "text_encoder")
    )
    return Encoders(
        autoencoder=autoencoder,
        image=ImageEncoder.load(folder, arguments.device, dtype) if image_fingerprint else None,
        text=TextEncoder.load(folder, arguments.device, dtype) if text_fingerprint else None,
        origin=LatentsOrigin(height, width, autoencoder.fingerprint()),
        embeddings_origin=EmbeddingsOrigin(height, width, image_fingerprint, text_fingerprint),
    )


def parse_arguments(env: Env) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("shards", type=Path, metavar="SHARDS", help="folder of shards, as tools/make_shards.py writes it")
    add("out", type=Path, metavar="OUT", help="folder of the new shards")
    add("--size", type=parse_size, required=True, metavar="HxW", help="height and width of the training")
    add("--frozen", default="tiny", metavar="FOLDER", help="the training's frozen.path; default: %(default)s")
    add("--no-clip", dest="clip", action="store_false", help="store latents only, without CLIP embeddings")
    add("--precision", choices=list(PRECISIONS), default="fp32", help="default: %(default)s")
    add("--chunk", type=int, default=14, metavar="N", help="frames per batch; default: %(default)s")
    add("--device", default=str(env.device), help="default: %(default)s")
    add("--max-refused", type=float, default=0.01, metavar="S", help="share that may be unreadable")
    add("--overwrite", action="store_true", help="replace existing shards in OUT; with one rank only")
    add("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    if arguments.overwrite and env.world > 1:
        raise ValueError(f"--overwrite needs 1 rank, but there are {env.world}: remove {arguments.out} first")
    return arguments


def parse_size(text: str) -> tuple[int, int]:
    """Parse 320x576 to (320, 576)."""
    height, width = text.split("x")
    return int(height), int(width)


if __name__ == "__main__":
    run_cli(main)
