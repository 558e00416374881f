"""One computation of a step: the losses of its micro-batches, their gradients left in the engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from svd_ds.batch import Batch
from svd_ds.parallel.collectives import all_gather_objects
from svd_ds.parallel.env import host
from svd_ds.training.fault_cause import FaultCause, Recomputation, find_cause
from svd_ds.training.parts import TrainingComponents


@dataclass(frozen=True)
class Computed:
    clips: tuple[str, ...]
    """Ids of this rank's."""
    losses: tuple[Tensor, ...]
    """Of this rank's micro-batches, one number a clip."""
    loss: float
    """This rank's mean."""
    grad_norm: float
    """Over all ranks."""
    local_norm: Tensor | None
    """Of this rank's own gradient, where it is kept."""

    def numbers(self) -> tuple[tuple[float, ...], float | None]:
        """Loss of each clip, and norm of this rank's own gradient, read from the device."""
        norm = None if self.local_norm is None else self.local_norm.item()
        return tuple(torch.cat(self.losses).tolist()), norm


def compute(parts: TrainingComponents, batches: Iterable[Batch]) -> Computed:
    """Forward and backward of a step's micro-batches. All ranks call it together."""
    clips: list[str] = []
    losses, means = [], []
    for batch in batches:
        loss_B = parts.objective.loss(parts.engine, batch.to(parts.device))
        loss = loss_B.mean()
        parts.engine.backward(loss, batch.num_micro_batches)
        means.append(loss.item())
        losses.append(loss_B.detach())
        clips += batch.ids
    norm, local_norm = parts.engine.gradient_norm(), parts.local_norm.take()
    return Computed(tuple(clips), tuple(losses), sum(means) / len(means), norm, local_norm)


def compute_again(
    parts: TrainingComponents, batches: Iterable[Batch], first: Computed
) -> tuple[Computed, FaultCause]:
    """Compute a step once more in place of the first time, and compare the two. All ranks call it together.

    What is random belongs to the clip, so nothing is drawn anew.
    """
    parts.engine.discard_gradients()
    parts.objective.discard()
    second = compute(parts, batches)
    (losses, norm), (losses_again, norm_again) = first.numbers(), second.numbers()
    norms = None if norm is None or norm_again is None else (norm, norm_again)
    ranks = all_gather_objects(
        [Recomputation(parts.rank, host(), first.clips, (losses, losses_again), norms)]
    )
    tolerance = parts.guard.config.recompute_tolerance
    cause = find_cause(ranks, (first.grad_norm, second.grad_norm), tolerance)
    if cause.hardware:
        # From now on a wrong gradient names its rank, too.
        parts.local_norm.start()
    return second, cause
