"""Leaves: modules whose parameters ZeRO-3 gathers and releases together, what it needs to know of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def largest_leaf_module(leaves: Iterable[nn.Module]) -> int:
    """Elements of the largest one, cut into shards or whole; 0 where there is none."""
    return max((sum(map(_numel, leaf.parameters())) for leaf in leaves), default=0)


def _numel(parameter: Any) -> int:
    # DeepSpeed's name for the size that a parameter had before it was cut up.
    return getattr(parameter, "ds_numel", parameter.numel())


def ensure_input_gradient(leaf: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Give a leaf an input that wants a gradient, where everything before the leaf is frozen.

    DeepSpeed reduces a leaf's gradients and releases its parameters once the gradients of its inputs are
    there: with none to wait for, it would do so before the leaf has run backward.
    """
    if not torch.is_grad_enabled() or any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return None
    first = next(i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point())
    return (*inputs[:first], inputs[first].detach().requires_grad_(), *inputs[first + 1 :])
