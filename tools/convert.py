"""Convert weights of a run, or public ones, to a public layout: diffusers folder, single file, LoRA file.

With --verify, list the checkpoints of a run and which of them are intact.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from torch import Tensor

from svd_ds.cli import print_line, run_cli
from svd_ds.fsync_io import replace_file
from svd_ds.model.unet import UNetConfig
from svd_ds.sample import frozen_folder, run_settings
from svd_ds.scalars import RELEASED_SCALARS
from svd_ds.small_files import read_json
from svd_ds.weights.decoder import load_decoder, save_pipeline_parts
from svd_ds.weights.io import load_unet, read_weights, write_weights
from svd_ds.weights.lora import save_lora
from svd_ds.weights.lora_files import add_updates, read_lora
from svd_ds.weights.manifest import COMPLETE, find_damage, read_manifest
from svd_ds.weights.shards import DAMAGED_SUFFIX, KEPT_AVERAGES, checkpoint_network
from svd_ds.weights.source import network_parameters

EXAMPLE = """examples:
  python tools/convert.py runs/small pipeline --layout diffusers
  python tools/convert.py runs/small/checkpoints/step-0000100 svd.safetensors --layout original --ema raw
  python tools/convert.py runs/small longer --layout diffusers --ema 0.12
  python tools/convert.py svd.safetensors pipeline --layout diffusers --frozen ~/svd-xt
  python tools/convert.py runs/camera camera.safetensors --layout lora
  python tools/convert.py ~/svd-xt merged --layout diffusers --lora pytorch_lora_weights.safetensors
  python tools/convert.py --verify runs/small

With --layout diffusers an image-to-video network is written as a folder for diffusers'
StableVideoDiffusionPipeline.from_pretrained; the other parts are copied from the run's frozen folder. A
trained decoder is written to vae/ of such a folder. LoRA adapters are merged, or written to a file of their
own with --layout lora."""
Weights = Iterator[tuple[str, Tensor]]
PIPELINE = "StableVideoDiffusionPipeline"
PARTS = ("vae", "image_encoder", "feature_extractor", "scheduler")


def main() -> None:
    arguments = parse_arguments()
    if arguments.verify:
        verify(arguments.source)
        return
    target: Path | None = arguments.target
    if target is None or arguments.layout is None:
        raise ValueError("give SRC, DST and --layout, or --verify and a run")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} already exists: choose another path, or remove it")
    if arguments.layout != "diffusers" and target.suffix != ".safetensors":
        raise ValueError(f"the {arguments.layout} layout is one file: {target} must end in .safetensors")
    if not arguments.source.exists():
        raise FileNotFoundError(f"{arguments.source} does not exist")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        draft = Path(folder) / target.name
        note = convert(arguments, draft)
        replace_file(draft, target)
    print(f"wrote {target}{note}")


def verify(source: Path) -> None:
    """List the checkpoints of a run, or the checkpoint at `source`, and check them against their checksums.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: a checkpoint is damaged, or there is none.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    found = find_checkpoints(source)
    if not found:
        raise ValueError(f"{source} has no checkpoint")
    damaged = []
    for folder in track(found, "verify", console=Console(stderr=True)):
        if DAMAGED_SUFFIX in folder.name:
            print_line(f"{folder}  set aside as damaged, not used")
        elif damage := describe_damage(folder):
            damaged.append(folder)
            print_line(f"{folder}  damaged: {damage}")
        else:
            print_line(f"{folder}  intact")
    if damaged:
        names = ", ".join(folder.name for folder in damaged)
        raise ValueError(f"{len(damaged)} of {len(found)} checkpoints in {source} are damaged: {names}")


def find_checkpoints(source: Path) -> list[Path]:
    """Return the checkpoints of a run and those kept for its averages, in order; or `source` if it is a
    checkpoint."""
    if not (source / "checkpoints").is_dir():
        return [source] if (source / COMPLETE).exists() or checkpoint_network(source) else []
    pattern = re.compile(rf"step-\d+({re.escape(DAMAGED_SUFFIX)}.*)?")
    return [
        path
        for folder in ("checkpoints", KEPT_AVERAGES)
        for path in sorted((source / folder).glob("step-*"))
        if path.is_dir() and pattern.fullmatch(path.name)
    ]


def describe_damage(checkpoint: Path) -> str | None:
    """Describe the damage of a checkpoint; None if it is intact."""
    try:
        manifest = read_manifest(checkpoint)
    except (ValueError, OSError) as error:
        return str(error)
    names = None
    if checkpoint.parent.name == KEPT_AVERAGES:
        # The other files were removed, but the manifest still lists the complete checkpoint.
        names = [name for name in manifest.files if name == "state.json" or name.startswith("ema-power-")]
    return find_damage(checkpoint, manifest, names)


def convert(arguments: argparse.Namespace, draft: Path) -> str:
    """Write the requested layout to `draft`, and return a note for the user, or ""."""
    if checkpoint_network(arguments.source) == "decoder":
        parts = arguments.frozen or frozen_path(run_settings(arguments.source))
        if parts is None or arguments.layout != "diffusers":
            raise ValueError(f"{arguments.source} is a decoder: it needs --layout diffusers and --frozen")
        save_pipeline_parts(parts, load_decoder(arguments.source, arguments.ema), draft)
        return ""
    if arguments.layout == "lora":
        if arguments.lora:
            raise ValueError("--lora merges a file into the weights: it needs --layout diffusers or original")
        save_lora(load_unet(arguments.source, arguments.ema, merge=False), draft)
        return ""
    config, tensors = read_weights(arguments.source, which=arguments.ema)
    tensors = checked_complete(arguments.source, config, tensors)
    if arguments.lora:
        tensors = add_lora_updates(arguments.lora, arguments.lora_scale, config, tensors)
    if arguments.layout == "original":
        write_weights(config, tensors, draft, "original")
        return ""
    frozen = find_pipeline_parts(arguments.source, arguments.frozen, config)
    write_weights(config, tensors, draft / "unet", "diffusers")
    if frozen is None:
        return " with unet/ alone: diffusers has no pipeline for the conditioning of this network"
    for part in PARTS:
        shutil.copytree(frozen / part, draft / part)
    shutil.copy(frozen / "model_index.json", draft)
    return ""


def checked_complete(source: Path, config: UNetConfig, tensors: Weights) -> Weights:
    """Yield the tensors as they are read, and check at the end that none is missing.

    Raises:
        ValueError: `source` has only the tensors of an image model (raised at the end).
    """
    num_expected, num_found = len(network_parameters(config)), 0
    for tensor in track(tensors, "read", total=num_expected):
        num_found += 1
        yield tensor
    if num_found < num_expected:
        raise ValueError(
            f"{source} has {num_found} of the video network's {num_expected} tensors: it is an image model, "
            "from which a run can start by init.from"
        )


def add_lora_updates(path: Path, scale: float, config: UNetConfig, tensors: Weights) -> Weights:
    """Add the updates of a LoRA file to the tensors."""
    shapes = {name: parameter.shape for name, parameter in network_parameters(config).items()}
    updates = read_lora(path, config, shapes)
    return ((name, add_updates(name, tensor, updates, scale)) for name, tensor in tensors)


def find_pipeline_parts(source: Path, frozen: Path | None, config: UNetConfig) -> Path | None:
    """Return the pipeline folder that this network fits into, or None if diffusers has no such pipeline.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: the folder is unknown, or another kind of pipeline.
    """
    settings = run_settings(source)
    if not fits_pipeline(config, settings):
        return None
    frozen = frozen or frozen_path(settings) or (source if (source / "vae").is_dir() else None)
    if frozen is None:
        raise ValueError(f"{source} has weights only: give a folder with {', '.join(PARTS)} by --frozen")
    for name in ("model_index.json", *PARTS):
        if not (frozen / name).exists():
            raise FileNotFoundError(f"{frozen} has no {name}: give a local {PIPELINE} folder by --frozen")
    kind = read_json(frozen / "model_index.json")["_class_name"]
    if kind != PIPELINE:
        raise ValueError(f"{frozen} is a {kind} folder: give a local {PIPELINE} folder by --frozen")
    return frozen


def frozen_path(settings: dict[str, Any] | None) -> Path | None:
    """Return the folder of the frozen parts according to the settings of a run; None without settings."""
    return Path(frozen_folder(settings["frozen"]["path"])) if settings else None


def fits_pipeline(config: UNetConfig, settings: dict[str, Any] | None) -> bool:
    """Return True if the network is conditioned on an image in the same way as the released models."""
    if config.in_channels != 2 * config.out_channels or config.num_scalars != len(RELEASED_SCALARS):
        return False
    if settings is None:
        return True
    conditioning = settings["conditioning"]
    is_image = conditioning["context"] == conditioning["concat"] == "image"
    return is_image and tuple(conditioning["scalars"]) == RELEASED_SCALARS


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="run, checkpoint, diffusers folder or original file")
    add("target", type=Path, nargs="?", metavar="DST", help="folder (diffusers) or file to write")
    add("--layout", choices=("diffusers", "original", "lora"), help="layout of DST")
    add("--verify", action="store_true", help="list the run's checkpoints: intact, or damaged and where")
    add("--ema", metavar="NAME", help="average, EMA length (0.07), or raw; default: the first average")
    add("--lora", type=Path, metavar="FILE", help="LoRA file to merge into the weights")
    add("--lora-scale", type=float, default=1.0, metavar="S", help="factor of the LoRA updates; default: 1")
    add("--frozen", type=Path, metavar="FOLDER", help="pipeline folder whose other parts are copied")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
