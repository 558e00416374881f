"""Gradient norm of one rank, which ZeRO-3 does not keep: it reduces gradients while they are computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LocalNorm:
    """Hooks that accumulate the gradient norm on the device, without synchronisation; off until `start`."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._squares: list[Tensor] = []
        self._started = False

    def start(self) -> None:
        """Register the hooks: the norm is accumulated from the next backward pass on."""
        if not self._started:
            self._started = True
            for parameter in self._parameters:
                parameter.register_hook(self._add)

    def take(self) -> Tensor | None:
        """Return the norm since the last call, a float64 scalar; None if there was no backward pass.

        It is the square root of the sum of squares over the gradients of all parameters and micro-batches.
        """
        squares, self._squares = self._squares, []
        return torch.stack(squares).sum().sqrt() if squares else None

    @torch.no_grad()
    def _add(self, gradient: Tensor) -> None:
        self._squares.append(torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square())
