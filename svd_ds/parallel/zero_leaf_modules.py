"""ZeRO-3 leaf modules, whose parameters are gathered and released together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def largest_leaf_module(leaves: Iterable[nn.Module]) -> int:
    """Return the number of elements of the largest leaf module, sharded or not; 0 without leaf modules."""
    return max((sum(map(_numel, leaf.parameters())) for leaf in leaves), default=0)


def _numel(parameter: Any) -> int:
    # DeepSpeed's name for the size of a parameter before it was sharded.
    return getattr(parameter, "ds_numel", parameter.numel())


def ensure_input_gradient(leaf: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Make an input of the leaf require a gradient if everything before the leaf is frozen.

    This is a forward pre-hook. DeepSpeed reduces a leaf's gradients and releases its parameters once the
    gradients of its inputs are ready. If no input requires a gradient, it does so too early: before the
    backward pass of the leaf.
    """
    if not torch.is_grad_enabled() or any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return None
    first = next(i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point())
    return (*inputs[:first], inputs[first].detach().requires_grad_(), *inputs[first + 1 :])
