"""One computation of a step: the losses of its micro-batches, their gradients left in the engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from svd_ds.batch import Batch
from svd_ds.training.parts import Parts


@dataclass(frozen=True)
class Computed:
    losses: tuple[float, ...]
    """Of this rank's micro-batches."""
    grad_norm: float
    """Over all ranks."""

    @property
    def loss(self) -> float:
        """This rank's mean."""
        return sum(self.losses) / len(self.losses)


def compute(parts: Parts, batches: Iterable[Batch]) -> Computed:
    """Forward and backward of a step's micro-batches. All ranks call it together."""
    losses = []
    for batch in batches:
        loss = parts.objective.loss(parts.engine, batch.to(parts.device)).mean()
        parts.engine.backward(loss, batch.accumulation)
        losses.append(loss.item())
    return Computed(tuple(losses), parts.engine.gradient_norm())
