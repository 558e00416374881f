"""Activation checkpointing, put on named blocks from outside: the network knows nothing of it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

POLICIES = ("none", "blocks", "attention", "full")
KEPT = ("aten::_scaled_dot_product_", "flash_attn::_flash_attn_forward")
"""How the names of fused attention kernels begin: torch's for each processor, and flash_attn's."""


def apply_recompute(module: nn.Module, names: Iterable[str], policy: str) -> None:
    """Make the blocks of `module` called `names` forget their activations and compute them again in backward.

    policy: none keeps every activation; blocks keeps only what goes into each block; attention keeps the
    results of fused attention kernels as well: for one tensor more an attention, what costs most for the
    bytes that it leaves behind is not done twice; full keeps only what goes into the modules that blocks
    stand in: the least, but more is in memory at once while one of these is computed again.
    Names of parameters do not change. Only `forward` is wrapped, not the call: the hooks by which ZeRO-3
    gathers a block's parameters before its forward and its backward run once each, outside the recomputation
    (with full, inside it, and once more).
    """
    if policy not in POLICIES:
        raise ValueError(f"recompute is {policy!r}: choose {' or '.join(POLICIES)}")
    if policy == "none":
        return
    recomputed = partial(checkpoint, use_reentrant=False)
    if policy == "attention":
        recomputed = partial(recomputed, context_fn=partial(create_selective_checkpoint_contexts, _keep))
    units = dict.fromkeys(_around(module, name) for name in names) if policy == "full" else names
    for name in units:
        block = module.get_submodule(name)
        block.forward = partial(recomputed, block.forward)  # type: ignore[method-assign]


def _around(module: nn.Module, name: str) -> str:
    """The name of the nearest module around `name` that computes something: a list does not."""
    around = name.rpartition(".")[0]
    while isinstance(module.get_submodule(around), nn.ModuleList):
        around = around.rpartition(".")[0]
    return around


def _keep(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    kept = operator.name().startswith(KEPT)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
