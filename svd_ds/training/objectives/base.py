"""Interface of training objectives: the loss of each clip, and the state that a checkpoint saves.

An objective does not read from the device: every read waits for the work before it. Numbers that it needs on
the host are returned by `reduce_terms` and come back in `end_step`, read by `StepGradients.read`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from torch import Tensor

from svd_ds.batch import Batch, Draws


class Objective(ABC):
    """Training objective of a network.

    `draw` is called ahead, in another thread. The loop calls `loss` for each micro-batch of a step,
    `reduce_terms` after the last one, and `end_step` after the optimiser step.
    """

    @abstractmethod
    def draw(self, batch: Batch) -> Batch:
        """Return the batch with what its ordinals and captions determine: random numbers, and token ids if a
        caption is read. All of it is in host memory. Any thread may call it."""

    @abstractmethod
    def loss(self, net: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Return the loss of each clip, (B,) float32, differentiable in the network's parameters."""

    def with_draws(self, batch: Batch) -> tuple[Batch, Draws]:
        """Return a batch and its draws. A batch that has none gets them here, and waits for their copy."""
        if batch.draws is None:
            batch = self.draw(batch).to(batch.frames_BTCHW.device)
        assert batch.draws is not None
        return batch, batch.draws

    def reduce_terms(self) -> dict[str, Tensor]:
        """Reduce the terms of the loss over all ranks, and return scalars on the device that `end_step`
        needs. All ranks call it."""
        return {}

    def end_step(self, terms: Mapping[str, float]) -> dict[str, float]:
        """End a step, and return the terms of its loss by name, averaged over all clips of all ranks.

        Args:
            terms: values of the scalars that `reduce_terms` returned.
        """
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
