"""Low-rank adapters (LoRA, arXiv 2106.09685), attached to a network's attention layers from outside.

An adapted layer computes W x + (alpha / rank) B A x. B starts at zero, so attaching an adapter changes no
output. If one layer combines several public ones (queries, keys and values), each of these has its own A
and B. Their A matrices are joined into one, so that there is one product for all of them:

    a.weight (parts * rank, in)      b (parts, out / parts, rank)

weights/lora.py saves and loads adapters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svd_ds.model.layers import CrossAttention
from svd_ds.model.spatial import SpatialAttention
from svd_ds.model.temporal import TemporalAttention
from svd_ds.model.unet import UNet
from svd_ds.settings import Settings, choice, number

TARGETS: dict[str, tuple[type[nn.Module], ...]] = {
    "temporal_attention": (TemporalAttention,),
    "spatial_attention": (SpatialAttention,),
    "attention": (TemporalAttention, SpatialAttention, CrossAttention),
}
NUM_PARTS = {"q": 1, "kv": 2, "qkv": 3, "out": 1}
"""Linear layers of an attention -> number of public layers that each of them combines."""


@dataclass(frozen=True)
class LoraConfig(Settings, section="lora"):
    """Adapters of a run."""

    rank: int = number(16, ge=0, le=65_536)
    """Rank of each update; 0: no adapters. The camera-motion adapters of the paper have rank 16
    (arXiv 2311.15127 D.4.2)."""
    alpha: float = number(16.0, gt=0, le=1e6)
    """Scale: updates are multiplied by alpha / rank."""
    target: str = choice("temporal_attention", TARGETS)
    """Layers that get an adapter: temporal_attention (among the frames of a pixel, as in the paper) |
    spatial_attention (among the pixels of a frame) | attention (both of these and cross-attention)."""


class LowRankUpdate(nn.Module):
    """The update of one linear layer, added to its output by a forward hook."""

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


def _add_update(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + layer.lora(inputs[0])


def is_adapter(parameter: str) -> bool:
    """Return True if a parameter of this name belongs to an adapter."""
    return ".lora." in parameter


def low_rank_update(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Compute the update of a layer's weight, (alpha / rank) B A.

    Args:
        a: (parts * rank, in).
        b: (parts, out / parts, rank).
        alpha: the scale.

    Returns:
        (out, in), float32.
    """
    parts, _, rank = b.shape
    return alpha / rank * (b.float() @ a.float().unflatten(0, (parts, rank))).flatten(0, 1)


def add_lora(unet: UNet, config: LoraConfig) -> list[str]:
    """Attach new adapters to the layers of `config.target`.

    The other parameters are not frozen here: the trainer gives its optimiser the adapters alone. Under ZeRO-3
    this must be called in the context in which the network is built.

    Returns:
        The names of the adapters' parameters.

    Raises:
        ValueError: the network has no layers of this target, or already has adapters.
    """
    if config.rank:
        layers = linear_layers(unet, config.target)
        if not layers:
            raise ValueError(f"lora.target is {config.target}: the network has no such layers")
        attach_adapters(unet, layers, config.rank, config.alpha)
    return adapter_parameters(unet)


def merge_lora(unet: UNet) -> None:
    """Add the update of every adapter to the weight of its layer, and remove the adapters."""
    for layer in adapted_layers(unet).values():
        update = low_rank_update(layer.lora.a.weight.detach(), layer.lora.b.detach(), layer.lora.alpha)
        layer.weight.data.copy_(layer.weight.data.float() + update)
        layer.lora.hook.remove()
        del layer.lora


def linear_layers(unet: UNet, target: str) -> list[str]:
    """List the paths of the linear layers in the attentions of a target."""
    return [
        f"{path}.{leaf}"
        for path, module in unet.named_modules()
        if isinstance(module, TARGETS[target])
        for leaf in NUM_PARTS
        if hasattr(module, leaf)
    ]


def attach_adapters(unet: UNet, paths: Iterable[str], rank: int, alpha: float) -> None:
    """Attach a new adapter to each linear layer in `paths`.

    Raises:
        ValueError: the network has adapters already.
    """
    if adapted_layers(unet):
        raise ValueError("the network has adapters already: merge them first")
    for path in paths:
        layer: Any = unet.get_submodule(path)
        layer.lora = LowRankUpdate(layer, NUM_PARTS[path.rpartition(".")[2]], rank, alpha)


def adapted_layers(unet: UNet) -> dict[str, Any]:
    """Return path -> layer, of every layer that has an adapter."""
    return {path: module for path, module in unet.named_modules() if hasattr(module, "lora")}


def adapter_parameters(unet: UNet) -> list[str]:
    """List the names of the adapters' parameters."""
    return [name for name, _ in unet.named_parameters() if is_adapter(name)]
