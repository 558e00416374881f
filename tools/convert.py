"""Write a run's weights, or public ones, in a public layout: a diffusers folder, a single file, adapters.

With --verify, list the checkpoints of a run instead, and which of them are whole."""

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
from svd_ds.model.conditioner import RELEASED_SCALARS
from svd_ds.model.unet import UNetConfig
from svd_ds.sample import frozen_folder, run_settings
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

With --layout diffusers an image-to-video network becomes a folder that diffusers'
StableVideoDiffusionPipeline.from_pretrained loads; its other parts are copied from where the run had them. So
does a trained decoder, in vae/. Low-rank adapters are merged, or written by themselves with --layout lora."""
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
        raise ValueError("convert.py takes SRC, DST and --layout, or --verify and a run")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} is there already: name a new one, or remove it")
    if arguments.layout != "diffusers" and target.suffix != ".safetensors":
        raise ValueError(f"the {arguments.layout} layout is one file: {target} must end in .safetensors")
    if not arguments.source.exists():
        raise FileNotFoundError(f"there is nothing at {arguments.source}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        draft = Path(folder) / target.name
        note = convert(arguments, draft)
        replace_file(draft, target)
    print(f"wrote {target}{note}")


def verify(source: Path) -> None:
    """Print each checkpoint of a run, or the one at `source` and whether its files are as they were written.

    Raises:
        ValueError: one is damaged, or there is none.
    """
    if not source.exists():
        raise FileNotFoundError(f"there is nothing at {source}")
    found = checkpoints_of(source)
    if not found:
        raise ValueError(f"{source} has no checkpoint")
    damaged = []
    for folder in track(found, "verify", console=Console(stderr=True)):
        if DAMAGED_SUFFIX in folder.name:
            print_line(f"{folder}  set aside as damaged, and not used")
        elif damage := damage_in(folder):
            damaged.append(folder)
            print_line(f"{folder}  damaged: {damage}")
        else:
            print_line(f"{folder}  whole")
    if damaged:
        names = ", ".join(folder.name for folder in damaged)
        raise ValueError(f"{len(damaged)} of {len(found)} checkpoints in {source} are damaged: {names}")


def checkpoints_of(source: Path) -> list[Path]:
    """Every checkpoint of a run in order, and what it kept for its averages; or the checkpoint itself."""
    if not (source / "checkpoints").is_dir():
        return [source] if (source / COMPLETE).exists() or checkpoint_network(source) else []
    pattern = re.compile(rf"step-\d+({re.escape(DAMAGED_SUFFIX)}.*)?")
    return [
        path
        for room in ("checkpoints", KEPT_AVERAGES)
        for path in sorted((source / room).glob("step-*"))
        if path.is_dir() and pattern.fullmatch(path.name)
    ]


def damage_in(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None where it is whole."""
    try:
        manifest = read_manifest(checkpoint)
    except (ValueError, OSError) as error:
        return str(error)
    names = None
    if checkpoint.parent.name == KEPT_AVERAGES:
        # The rest was removed, and the manifest is still that of the whole checkpoint.
        names = [name for name in manifest.files if name == "state.json" or name.startswith("ema-power-")]
    return find_damage(checkpoint, manifest, names)


def convert(arguments: argparse.Namespace, draft: Path) -> str:
    """Write the layout asked for to `draft`; what is to be said of it."""
    if checkpoint_network(arguments.source) == "decoder":
        parts = arguments.frozen or frozen_of(run_settings(arguments.source))
        if parts is None or arguments.layout != "diffusers":
            raise ValueError(f"{arguments.source} holds a decoder: it takes --layout diffusers and --frozen")
        save_pipeline_parts(parts, load_decoder(arguments.source, arguments.ema), draft)
        return ""
    if arguments.layout == "lora":
        if arguments.lora:
            raise ValueError("--lora merges a file into weights: it takes --layout diffusers or original")
        save_lora(load_unet(arguments.source, arguments.ema, merge=False), draft)
        return ""
    config, tensors = read_weights(arguments.source, which=arguments.ema)
    tensors = complete(arguments.source, config, tensors)
    if arguments.lora:
        tensors = with_lora(arguments.lora, arguments.lora_scale, config, tensors)
    if arguments.layout == "original":
        write_weights(config, tensors, draft, "original")
        return ""
    frozen = pipeline_parts(arguments.source, arguments.frozen, config)
    write_weights(config, tensors, draft / "unet", "diffusers")
    if frozen is None:
        return " with unet/ alone: diffusers has no pipeline for what this network takes"
    for part in PARTS:
        shutil.copytree(frozen / part, draft / part)
    shutil.copy(frozen / "model_index.json", draft)
    return ""


def complete(source: Path, config: UNetConfig, tensors: Weights) -> Weights:
    """The tensors as they are read. ValueError at their end where `source` has only an image model's."""
    total, found = len(network_parameters(config)), 0
    for tensor in track(tensors, "read", total=total):
        found += 1
        yield tensor
    if found < total:
        raise ValueError(
            f"{source} holds {found} of the video network's {total} tensors: it is an image model, from "
            "which a run starts with init.from"
        )


def with_lora(path: Path, scale: float, config: UNetConfig, tensors: Weights) -> Weights:
    """The tensors with the updates of a LoRA file added."""
    shapes = {name: parameter.shape for name, parameter in network_parameters(config).items()}
    updates = read_lora(path, config, shapes)
    return ((name, add_updates(name, tensor, updates, scale)) for name, tensor in tensors)


def pipeline_parts(source: Path, frozen: Path | None, config: UNetConfig) -> Path | None:
    """The folder of a pipeline that this network fits into, or None where diffusers has no such pipeline.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: nobody says where the parts are, or the folder is another kind of pipeline.
    """
    settings = run_settings(source)
    if not takes_what_the_pipeline_gives(config, settings):
        return None
    frozen = frozen or frozen_of(settings) or (source if (source / "vae").is_dir() else None)
    if frozen is None:
        raise ValueError(f"{source} is weights alone: name a folder that has {', '.join(PARTS)} by --frozen")
    for name in ("model_index.json", *PARTS):
        if not (frozen / name).exists():
            raise FileNotFoundError(f"{frozen} has no {name}: name a local {PIPELINE} folder by --frozen")
    kind = read_json(frozen / "model_index.json")["_class_name"]
    if kind != PIPELINE:
        raise ValueError(f"{frozen} is a {kind}: name a local {PIPELINE} folder by --frozen")
    return frozen


def frozen_of(settings: dict[str, Any] | None) -> Path | None:
    return Path(frozen_folder(settings["frozen"]["path"])) if settings else None


def takes_what_the_pipeline_gives(config: UNetConfig, settings: dict[str, Any] | None) -> bool:
    """Whether the network is conditioned on an image in the released models' way."""
    if config.in_channels != 2 * config.out_channels or config.num_scalars != len(RELEASED_SCALARS):
        return False
    if settings is None:
        return True
    told = settings["conditioning"]
    return told["context"] == told["concat"] == "image" and tuple(told["scalars"]) == RELEASED_SCALARS


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="a run, a checkpoint, a diffusers folder, an original file")
    add("target", type=Path, nargs="?", metavar="DST", help="the folder (diffusers) or file to be")
    add("--layout", choices=("diffusers", "original", "lora"))
    add("--verify", action="store_true", help="list the run's checkpoints: whole, or damaged and where")
    add("--ema", metavar="NAME", help="of a run: an average, a length (0.07), or raw; its first average")
    add("--lora", type=Path, metavar="FILE", help="a LoRA file, which is merged into the weights")
    add("--lora-scale", type=float, default=1.0, metavar="S", help="of its updates; default: 1")
    add("--frozen", type=Path, metavar="FOLDER", help="the pipeline whose other parts are copied")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
