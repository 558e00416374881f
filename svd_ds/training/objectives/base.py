"""What a run's network learns: a loss a clip, and what goes along with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from torch import Tensor

from svd_ds.batch import Batch


class Objective(ABC):
    """The loop asks for the loss of each micro-batch, and ends the step when the network's has been taken."""

    @abstractmethod
    def loss(self, net: Callable[..., Tensor], batch: Batch) -> Tensor:
        """One number a clip, (B,) float32; differentiable in the network's parameters."""

    def end_step(self) -> dict[str, float]:
        """What the step's loss was made of, by name, over all ranks: nothing, unless told. All call it."""
        return {}

    def discard(self) -> None:
        """Forget what the losses since the last `end_step` have left here: the step is computed again."""
        return

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps for `load_state`: the same on every rank."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        assert not state, "this objective has no state"
