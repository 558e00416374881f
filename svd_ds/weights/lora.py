"""Save the adapters of a network to a file, and load them.

The format is that of PEFT and diffusers: `unet.MODULE.lora_A.weight` and `lora_B.weight`, with diffusers'
names of modules, and rank and alpha in the header. lora_files.py also reads the formats of other trainers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from svd_ds.fsync_io import replace_tensors
from svd_ds.model.lora import adapted_layers, adapter_parameters, attach_adapters, linear_layers
from svd_ds.model.unet import UNet
from svd_ds.weights.lora_files import HEADER, read_lora
from svd_ds.weights.public_names import public_modules


def lora_state(unet: UNet) -> dict[str, Tensor]:
    """Return the adapters' tensors under their public names.

    Raises:
        ValueError: the network has no public layout.
    """
    modules = public_modules(unet.config, "diffusers")
    state: dict[str, Tensor] = {}
    for path, layer in adapted_layers(unet).items():
        parts_of_a = layer.lora.a.weight.detach().cpu().chunk(len(modules[path]))
        for public, a, b in zip(modules[path], parts_of_a, layer.lora.b.detach().cpu(), strict=True):
            state |= {f"unet.{public}.lora_A.weight": a.clone(), f"unet.{public}.lora_B.weight": b.clone()}
    return state


def save_lora(unet: UNet, path: str | Path) -> None:
    """Write the adapters to one .safetensors file.

    Raises:
        OSError: the file cannot be written.
        ValueError: the network has no adapters, or no public layout.
    """
    adapters = [layer.lora for layer in adapted_layers(unet).values()]
    if not adapters:
        raise ValueError("the network has no adapters to write")
    state = lora_state(unet)
    modules = {key.rpartition(".lora_")[0].removeprefix("unet.") for key in state}
    settings = {
        "unet.r": adapters[0].rank,
        "unet.lora_alpha": adapters[0].alpha,
        "unet.target_modules": sorted(modules),
    }
    replace_tensors(Path(path), state, {"format": "pt", HEADER: json.dumps(settings)})


def load_lora(unet: UNet, path: str | Path) -> list[str]:
    """Attach the adapters of a file to a network that has none.

    lora_files.py lists the formats. If the file adapts only some parts of a fused layer (to_q and to_v), the
    other parts keep their output.

    Returns:
        The names of the adapters' parameters.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file adapts a layer that the network lacks, in another shape, or has several ranks.
    """
    path = Path(path)
    updates = read_lora(path, unet.config, {name: value.shape for name, value in unet.named_parameters()})
    flat = [update for layer_updates in updates.values() for update in layer_updates]
    ranks = sorted({len(update.a) for update in flat})
    if len(ranks) != 1:
        raise ValueError(f"{path} has adapters of the ranks {ranks}: all must have the same rank")
    modules = {name.removesuffix(".weight"): layer_updates for name, layer_updates in updates.items()}
    if others := modules.keys() - set(linear_layers(unet, "attention")):
        name = modules[min(others)][0].name
        raise ValueError(f"{path} holds {name}, which adapts no attention layer of this network")
    alphas = {update.alpha for update in flat}
    alpha = alphas.pop() if len(alphas) == 1 else float(ranks[0])
    attach_adapters(unet, modules, ranks[0], alpha)
    for module, layer_updates in modules.items():
        lora: Any = unet.get_submodule(f"{module}.lora")
        for update in layer_updates:
            lora.a.weight.data.chunk(update.num_parts)[update.part].copy_(update.a)
            # An adapted network has one alpha for all layers: the ratio to the layer's alpha goes into its B.
            lora.b.data[update.part].copy_(update.b * (update.alpha / alpha))
    return adapter_parameters(unet)
