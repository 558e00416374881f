"""Interface of training objectives: the loss of each clip, and the state that a checkpoint saves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from torch import Tensor

from svd_ds.batch import Batch


class Objective(ABC):
    """Training objective of a network.

    The loop calls `loss` for each micro-batch of a step, and `end_step` after the optimiser step.
    """

    @abstractmethod
    def loss(self, net: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Return the loss of each clip, (B,) float32, differentiable in the network's parameters."""

    def end_step(self) -> dict[str, float]:
        """End a step, and return the terms of its loss by name, averaged over all ranks. All ranks call
        it."""
        return {}

    def discard(self) -> None:
        """Discard the effects of `loss` since the last `end_step`, because the step is computed again."""
        return

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to save in a checkpoint, the same on every rank."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the tensors that `state` returned."""
        assert not state, "this objective has no state"
