"""Weights on disk: the two public layouts, and the shards that a run saves.

Wherever weights are read, `path` is one of

- a diffusers pipeline folder or its unet folder: SVD, or the image UNet of Stable Diffusion 2;
- an original single .safetensors file (`model.diffusion_model.*`), likewise video or image;
- a run folder, which means its newest complete checkpoint, or a checkpoint folder: `unet/config.json` and
  `unet/rank-00000-of-00002.safetensors ...`, which hold the ranks' flat slices of every parameter under our
  names; joined in order, cut to the parameter's size and reshaped, they are the parameter. Averages lie
  beside `unet` as `ema-NAME`, without the parameters that are frozen.

Tensors are read one at a time. Nothing is unpickled.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from svd_ds.fsync_io import replace_tensors, replace_text
from svd_ds.model.lora import add_lora
from svd_ds.model.unet import UNet, UNetConfig
from svd_ds.weights.lora_files import merged, read_lora
from svd_ds.weights.public_configs import config_to_diffusers
from svd_ds.weights.public_names import public_modules, public_names, to_public
from svd_ds.weights.source import CONFIG_KEY, open_weights

logger = logging.getLogger(__name__)


def load_unet(
    path: str | Path, which: str | None = None, config: UNetConfig | None = None, merge: bool = True
) -> UNet:
    """A float32 UNet on the CPU with the weights at `path`; arguments and errors as of `read_weights`.

    A run that trained low-rank adapters gives the network with their updates merged into its weights, or
    with `merge=False` the adapters on it. What `path` lacks (the temporal layers of an image UNet) has
    initial values, and a warning says so.
    """
    source = open_weights(Path(path), which)
    config = config or source.config
    new = source.check(config)
    with torch.device("meta"):
        unet = UNet(config)
        if source.lora is not None and not merge:
            add_lora(unet, source.lora)
    unet.to_empty(device="cpu")
    for module in {name.rpartition(".")[0] for name in new}:
        cast(Any, unet.get_submodule(module)).reset_parameters()
    parameters = dict(unet.named_parameters())
    with torch.no_grad():
        for name, tensor in source.tensors(config, merge):
            parameters[name].copy_(tensor)
    if new:
        logger.warning("%d tensors are not in %s and start afresh: %s and so on", len(new), path, new[0])
    return unet


def merge_lora_file(unet: UNet, path: str | Path, scale: float = 1.0) -> None:
    """Add the updates of a LoRA file, multiplied by `scale`, to a network's weights; see lora_files.py.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a tensor of the file belongs to no linear layer of the network, or has another shape.
    """
    parameters = dict(unet.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    updates = read_lora(Path(path), unet.config, shapes)
    for name in updates:
        parameters[name].data.copy_(merged(name, parameters[name].data, updates, scale))


def read_weights(
    path: str | Path, config: UNetConfig | None = None, which: str | None = None
) -> tuple[UNetConfig, Iterator[tuple[str, Tensor]]]:
    """The config, and the parameters one by one under our names, in our shapes and in the dtype on disk.

    Args:
        config: the network they are for, by default the one that `path` describes. It may go beyond it:
            temporal layers, scalars or a mask embedding where `path` has none, which are then not among the
            tensors, and more input channels or scalars, whose weights are then zeros.
        which: of a run, `raw` or the name of an average; by default its first average, or raw if it has none.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it is not a UNet, or not one that fits `config`.
    """
    source = open_weights(Path(path), which)
    config = config or source.config
    source.check(config)
    return config, source.tensors(config, merge=True)


def save_unet(unet: UNet, path: str | Path, layout: str = "diffusers") -> None:
    """Write the weights in a public layout; see `write_weights`."""
    write_weights(unet.config, unet.named_parameters(), path, layout)


def write_weights(
    config: UNetConfig, tensors: Iterable[tuple[str, Tensor]], path: str | Path, layout: str = "diffusers"
) -> None:
    """Write parameters, given under our names, in a public layout.

    Args:
        path: a unet folder to be, for `diffusers`; a file to be, NAME.safetensors, for `original`.

    Raises:
        OSError: the weights cannot be written; no file under their final name is then left.
        ValueError: there is no such layout, or it cannot express this network.
    """
    path = Path(path)
    modules = public_modules(config, layout)
    metadata = {"format": "pt"}
    if layout == "diffusers":
        fields = json.dumps(config_to_diffusers(config), indent=2) + "\n"
        path.mkdir(parents=True, exist_ok=True)
        replace_text(path / "config.json", fields)
        path = path / "diffusion_pytorch_model.safetensors"
    elif path.suffix != ".safetensors":
        raise ValueError(
            f"the original layout is one file, whose name must end in .safetensors, not {path.name}"
        )
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata[CONFIG_KEY] = json.dumps(asdict(config))
    public: dict[str, Tensor] = {}
    for name, tensor in tensors:
        names = public_names(name, modules)
        parts = tensor.detach().cpu().chunk(len(names))
        for public_name, part in zip(names, parts, strict=True):
            # Parts of one tensor are cloned, for safetensors refuses shared memory.
            part = part.clone() if len(parts) > 1 else part
            public[public_name] = to_public(name, part).contiguous()
    replace_tensors(path, public, metadata)
