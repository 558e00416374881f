"""Low-rank adapters (LoRA, arXiv 2106.09685), put on a network's attention layers from outside.

An adapted layer gives W x + (alpha / rank) B A x. B starts at zero, so that nothing changes at first. Where
one layer of ours stands for several public ones (queries, keys and values), each of them has an A and a B of
its own. The A's lie joined in one matrix, so that the projection stays one product, and so does their own.

    a.weight (parts * rank, in)      b (parts, out / parts, rank)

Files are as PEFT and diffusers have them: `unet.MODULE.lora_A.weight` and `lora_B.weight`, with diffusers'
names of modules, and rank and alpha in the header.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svd_ds.fsync_io import replace_tensors
from svd_ds.model.layers import CrossAttention
from svd_ds.model.spatial import SpatialAttention
from svd_ds.model.temporal import TemporalAttention
from svd_ds.model.unet import UNet
from svd_ds.settings import Settings, choice, number
from svd_ds.weights.lora_files import HEADER, read_lora
from svd_ds.weights.public_names import public_modules

TARGETS: dict[str, tuple[type[nn.Module], ...]] = {
    "temporal_attention": (TemporalAttention,),
    "spatial_attention": (SpatialAttention,),
    "attention": (TemporalAttention, SpatialAttention, CrossAttention),
}
PARTS = {"q": 1, "kv": 2, "qkv": 3, "out": 1}
"""The linear layers of an attention, and how many public ones each stands for."""


@dataclass(frozen=True)
class LoraConfig(Settings, section="lora"):
    rank: int = number(16, ge=0, le=65_536)
    """Of each update; 0: no adapters. The paper's camera motions have 16 (arXiv 2311.15127 D.4.2)."""
    alpha: float = number(16.0, gt=0, le=1e6)
    """Updates are multiplied by alpha / rank."""
    target: str = choice("temporal_attention", TARGETS)
    """temporal_attention (along time, as in the paper) | spatial_attention (among a frame's pixels) |
    attention (both, and to the context)."""


class LowRank(nn.Module):
    """The update of one linear layer."""

    def __init__(self, layer: nn.Linear, parts: int, rank: int, alpha: float) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.rank, self.alpha = rank, alpha
        self.a = nn.Linear(layer.in_features, parts * rank, bias=False, **like)
        self.b = nn.Parameter(torch.zeros(parts, layer.out_features // parts, rank, **like))
        self.hook = layer.register_forward_hook(_add_update)

    def forward(self, x: Tensor) -> Tensor:
        low = self.a(x).unflatten(-1, (-1, self.rank))
        return self.alpha / self.rank * torch.einsum("...pr,por->...po", low, self.b).flatten(-2)


def is_adapter(parameter: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora." in parameter


def _add_update(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + layer.lora(inputs[0])


def low_rank_update(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """What a layer's weight gains by its adapter, (out, in), float32."""
    parts, _, rank = b.shape
    return alpha / rank * (b.float() @ a.float().unflatten(0, (parts, rank))).flatten(0, 1)


def add_lora(unet: UNet, config: LoraConfig) -> list[str]:
    """Put new adapters on the target's layers, and return the names of their parameters.

    The rest is frozen by whoever trains: by an optimiser that is given the adapters alone. Under ZeRO-3 this
    belongs into the context in which the network is built. ValueError where the target has no layers.
    """
    if config.rank:
        layers = _linears(unet, TARGETS[config.target])
        if not layers:
            raise ValueError(f"lora.target is {config.target}, of which the network has no layers")
        _adapt(unet, layers, config.rank, config.alpha)
    return _adapter_parameters(unet)


def merge_lora(unet: UNet) -> None:
    """Add every adapter's update to its layer's weight, and take the adapter off."""
    for layer in _adapted(unet).values():
        update = low_rank_update(layer.lora.a.weight.detach(), layer.lora.b.detach(), layer.lora.alpha)
        layer.weight.data.copy_(layer.weight.data.float() + update)
        layer.lora.hook.remove()
        del layer.lora


def lora_state(unet: UNet) -> dict[str, Tensor]:
    """The adapters under their public names. ValueError where a network has no public layout."""
    modules = public_modules(unet.config, "diffusers")
    state: dict[str, Tensor] = {}
    for path, layer in _adapted(unet).items():
        parts_of_a = layer.lora.a.weight.detach().cpu().chunk(len(modules[path]))
        for public, a, b in zip(modules[path], parts_of_a, layer.lora.b.detach().cpu(), strict=True):
            state |= {f"unet.{public}.lora_A.weight": a.clone(), f"unet.{public}.lora_B.weight": b.clone()}
    return state


def save_lora(unet: UNet, path: str | Path) -> None:
    """Write the adapters to one .safetensors file. ValueError where the network has none."""
    adapters = [layer.lora for layer in _adapted(unet).values()]
    if not adapters:
        raise ValueError("the network has no adapters to write")
    state = lora_state(unet)
    settings = {
        "unet.r": adapters[0].rank,
        "unet.lora_alpha": adapters[0].alpha,
        "unet.target_modules": sorted({_module_of(key).removeprefix("unet.") for key in state}),
    }
    replace_tensors(Path(path), state, {"format": "pt", HEADER: json.dumps(settings)})


def load_lora(unet: UNet, path: str | Path) -> list[str]:
    """Put the adapters of a file on a network without any, and return the names of their parameters.

    See lora_files.py for the files. Where one adapts only some parts of a fused layer (to_q and to_v), the
    others stay as they are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file adapts a layer that is not there, in another shape, or not all at one rank.
    """
    path = Path(path)
    updates = read_lora(path, unet.config, {name: value.shape for name, value in unet.named_parameters()})
    found = [update for each in updates.values() for update in each]
    ranks = sorted({len(update.a) for update in found})
    if len(ranks) != 1:
        raise ValueError(f"{path} has adapters of the ranks {ranks}, and must have one rank for all")
    modules = {name.removesuffix(".weight"): each for name, each in updates.items()}
    if others := modules.keys() - set(_linears(unet, TARGETS["attention"])):
        name = modules[min(others)][0].name
        raise ValueError(f"{path} holds {name}, which adapts no attention layer of this network")
    alphas = {update.alpha for update in found}
    alpha = alphas.pop() if len(alphas) == 1 else float(ranks[0])
    _adapt(unet, modules, ranks[0], alpha)
    for module, each in modules.items():
        lora: Any = unet.get_submodule(f"{module}.lora")
        for update in each:
            lora.a.weight.data.chunk(update.num_parts)[update.part].copy_(update.a)
            # Of layers whose alphas differ each is scaled by its own: an adapted network has one for all.
            lora.b.data[update.part].copy_(update.b * (update.alpha / alpha))
    return _adapter_parameters(unet)


def _linears(unet: UNet, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """Paths of the linear layers in attentions of these kinds."""
    return [
        f"{path}.{leaf}"
        for path, module in unet.named_modules()
        if isinstance(module, kinds)
        for leaf in PARTS
        if hasattr(module, leaf)
    ]


def _adapt(unet: UNet, paths: Iterable[str], rank: int, alpha: float) -> None:
    if _adapted(unet):
        raise ValueError("the network has adapters already: merge them first")
    for path in paths:
        layer: Any = unet.get_submodule(path)
        layer.lora = LowRank(layer, PARTS[path.rpartition(".")[2]], rank, alpha)


def _adapted(unet: UNet) -> dict[str, Any]:
    """Path -> layer, of every layer that has an adapter."""
    return {path: module for path, module in unet.named_modules() if hasattr(module, "lora")}


def _adapter_parameters(unet: UNet) -> list[str]:
    return [name for name, _ in unet.named_parameters() if is_adapter(name)]


def _module_of(key: str) -> str:
    return key.rpartition(".lora_")[0]
