"""The norm of a rank's own gradient, which ZeRO-3 adds to the others' while it is still being computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LocalNorm:
    """Off until `start`: it then reads every gradient once more, on the device, and waits for nothing."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._squares: list[Tensor] = []
        self._started = False

    def start(self) -> None:
        """Keep the norm from the next backward on."""
        if not self._started:
            self._started = True
            for parameter in self._parameters:
                parameter.register_hook(self._add)

    def take(self) -> Tensor | None:
        """Root of the sum of the squares of all gradients since the last call, by micro-batch; None where
        nothing was kept."""
        squares, self._squares = self._squares, []
        return torch.stack(squares).sum().sqrt() if squares else None

    @torch.no_grad()
    def _add(self, gradient: Tensor) -> None:
        self._squares.append(torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square())
