"""Activation checkpointing, put on named blocks from outside: the network knows nothing of it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

POLICIES = ("none", "blocks")


def apply_recompute(module: nn.Module, names: Iterable[str], policy: str) -> None:
    """Make the blocks of `module` called `names` forget their activations and compute them again in backward.

    policy: none keeps every activation, blocks keeps only what goes into each block.
    Names of parameters do not change. Only `forward` is wrapped, not the call: the hooks by which ZeRO-3
    gathers a block's parameters before its forward and its backward run once each, outside the recomputation.
    """
    if policy not in POLICIES:
        raise ValueError(f"recompute is {policy!r}: choose {' or '.join(POLICIES)}")
    if policy == "none":
        return
    for name in names:
        block = module.get_submodule(name)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
