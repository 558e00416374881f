"""Activation checkpointing, applied to named blocks of a network from outside."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

POLICIES = ("none", "blocks", "attention", "full")
SAVED_KERNELS = (
    "aten::_scaled_dot_product_",
    "flash_attn::_flash_attn_forward",
    "flash_attn_3::_flash_attn_forward",
    "flash_attn_3::fwd",
)
"""Prefixes of the names of fused attention kernels: torch's on every device, flash_attn's, and those of
FlashAttention-3, whose older releases call `fwd` directly."""


def apply_recompute(module: nn.Module, names: Iterable[str], policy: str) -> None:
    """Discard activations of blocks in forward, and compute them again in backward.

    Parameter names do not change. Only `forward` is wrapped, not `__call__`. The hooks by which ZeRO-3
    gathers a block's parameters therefore run outside the recomputation: once before the forward pass, and
    once before the backward pass. With the policy full they run inside it, once more.

    Args:
        names: blocks, by their names in `module`.
        policy: none keeps every activation. blocks keeps the inputs of each block. attention also keeps the
            outputs of fused attention kernels, which are the most expensive to recompute per byte. full keeps
            only the inputs of the modules around the blocks; it keeps the fewest tensors, but recomputing one
            of these modules takes more memory at once.

    Raises:
        ValueError: unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"recompute is {policy!r}: it must be one of {', '.join(POLICIES)}")
    if policy == "none":
        return
    # The networks draw no random numbers, so the generators' states are not needed again.
    recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if policy == "attention":
        recomputed = partial(recomputed, context_fn=partial(create_selective_checkpoint_contexts, _keep))
    units = dict.fromkeys(_around(module, name) for name in names) if policy == "full" else names
    for name in units:
        block = module.get_submodule(name)
        block.forward = partial(recomputed, block.forward)  # type: ignore[method-assign]


def _around(module: nn.Module, name: str) -> str:
    """Return the name of the nearest module around `name` that is not a ModuleList."""
    around = name.rpartition(".")[0]
    while isinstance(module.get_submodule(around), nn.ModuleList):
        around = around.rpartition(".")[0]
    return around


def _keep(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    is_saved = operator.name().startswith(SAVED_KERNELS)
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE
