"""Load and save the UNet's weights: the two public layouts, and the shards that a run saves.

A `path` to read from is one of

- a diffusers pipeline folder or its unet folder: SVD, or the image UNet of Stable Diffusion 2;
- an original single .safetensors file (`model.diffusion_model.*`), likewise video or image;
- a run folder, which means its newest complete checkpoint;
- a checkpoint folder: `unet/config.json`, and the ranks' shards (shards.py) in
  `unet/rank-00000-of-00002.safetensors ...`. Averages are next to `unet` as `ema-NAME`, without the frozen
  parameters.

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
from svd_ds.weights.lora_files import add_updates, read_lora
from svd_ds.weights.public_configs import config_to_diffusers
from svd_ds.weights.public_names import public_modules, public_names, to_public
from svd_ds.weights.source import CONFIG_KEY, open_weights

logger = logging.getLogger(__name__)


def load_unet(
    path: str | Path, which: str | None = None, config: UNetConfig | None = None, merge: bool = True
) -> UNet:
    """Load a UNet, float32 on the CPU.

    Parameters that `path` lacks (the temporal layers of an image UNet) get initial values, with a warning.

    Args:
        path: see the top of this module.
        which: `raw`, or the name of an average of a run, see `read_weights`.
        config: config of the network, see `read_weights`.
        merge: merge the low-rank adapters of a run into the weights; False leaves them on the network.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it is not a UNet, or does not fit `config`.
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
        logger.warning(
            "%d tensors are not in %s and get initial values: %s and so on", len(new), path, new[0]
        )
    return unet


def merge_lora_file(unet: UNet, path: str | Path, scale: float = 1.0) -> None:
    """Add the updates of a LoRA file to a network's weights.

    Args:
        unet: the network, changed in place.
        path: the file, in one of the formats of lora_files.py.
        scale: multiplier of the updates.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a tensor of the file belongs to no linear layer of the network, or has another shape.
    """
    parameters = dict(unet.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    updates = read_lora(Path(path), unet.config, shapes)
    for name in updates:
        parameters[name].data.copy_(add_updates(name, parameters[name].data, updates, scale))


def read_weights(
    path: str | Path, config: UNetConfig | None = None, which: str | None = None
) -> tuple[UNetConfig, Iterator[tuple[str, Tensor]]]:
    """Read weights one tensor at a time.

    Args:
        path: see the top of this module.
        config: config of the network that takes the weights; default: that of `path`. The network may have
            temporal layers, scalars or a mask embedding that `path` lacks; these are not among the tensors.
            It may also have more input channels or scalars, whose weights are zeros.
        which: for a run, `raw` or the name of an average; default: its first average, or raw if it has none.

    Returns:
        The config, and (name, tensor) pairs with our names and shapes, in the dtype on disk.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it is not a UNet, or does not fit `config`.
    """
    source = open_weights(Path(path), which)
    config = config or source.config
    source.check(config)
    return config, source.tensors(config, merge=True)


def save_unet(unet: UNet, path: str | Path, layout: str = "diffusers") -> None:
    """Write a network's weights in a public layout; arguments and errors are those of `write_weights`."""
    write_weights(unet.config, unet.named_parameters(), path, layout)


def write_weights(
    config: UNetConfig, tensors: Iterable[tuple[str, Tensor]], path: str | Path, layout: str = "diffusers"
) -> None:
    """Write parameters in a public layout.

    Args:
        config: config of the network.
        tensors: (name, tensor) pairs under our names.
        path: the unet folder to write in the layout `diffusers`, or the file NAME.safetensors in `original`.
        layout: one of public_names.LAYOUTS.

    Raises:
        OSError: the weights cannot be written; no partial file is left.
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
            f"the output is {path.name}: the original layout is one file, whose name must end in .safetensors"
        )
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata[CONFIG_KEY] = json.dumps(asdict(config))
    public: dict[str, Tensor] = {}
    for name, tensor in tensors:
        names = public_names(name, modules)
        parts = tensor.detach().cpu().chunk(len(names))
        for public_name, part in zip(names, parts, strict=True):
            # safetensors refuses tensors that share memory, so parts of one tensor are cloned.
            part = part.clone() if len(parts) > 1 else part
            public[public_name] = to_public(name, part).contiguous()
    replace_tensors(path, public, metadata)
