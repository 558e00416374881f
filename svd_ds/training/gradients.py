"""Forward and backward passes of a step; the gradients stay in the engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from svd_ds.batch import Batch
from svd_ds.data.cursor import Cursor
from svd_ds.parallel.collectives import all_gather_objects
from svd_ds.parallel.engine import Engine
from svd_ds.parallel.env import host
from svd_ds.parallel.local_norm import LocalNorm
from svd_ds.training.fault_cause import FaultCause, Recomputation, find_cause
from svd_ds.training.objectives.base import Objective
from svd_ds.training.usage import StageTimer


class StepBatches:
    """The micro-batches of one step, read lazily by iteration."""

    def __init__(self, batches: Iterator[tuple[Batch, Cursor]], timer: StageTimer) -> None:
        self._batches, self._timer = batches, timer
        self.read: list[Batch] = []
        """Micro-batches read so far."""
        self.cursor: Cursor
        """Cursor after the step."""

    def __iter__(self) -> Iterator[Batch]:
        while not self.read or len(self.read) < self.read[-1].num_micro_batches:
            with self._timer("data"):
                batch, self.cursor = next(self._batches)
            self.read.append(batch)
            yield batch


@dataclass(frozen=True)
class StepGradients:
    """Losses and gradient norms of one computation of a step."""

    clip_ids: tuple[str, ...]
    """Ids of this rank's clips."""
    losses: tuple[Tensor, ...]
    """Losses of this rank's micro-batches, each (B,)."""
    loss: float
    """Mean loss of this rank."""
    grad_norm: float
    """Gradient norm over all ranks."""
    local_norm: Tensor | None
    """Norm of this rank's own gradient; None unless `LocalNorm` is on."""

    def numbers(self) -> tuple[tuple[float, ...], float | None]:
        """Copy the loss of each clip, and the norm of this rank's own gradient, from the device."""
        norm = None if self.local_norm is None else self.local_norm.item()
        return tuple(torch.cat(self.losses).tolist()), norm


@dataclass(frozen=True)
class GradientComputation:
    """Computes the gradients of a step, and computes them again if the guard finds them out of bounds."""

    engine: Engine
    objective: Objective
    local_norm: LocalNorm
    rank: int
    device: torch.device

    def compute(self, micro_batches: Iterable[Batch]) -> StepGradients:
        """Run the forward and backward pass of each micro-batch of a step. All ranks call it together."""
        clip_ids: list[str] = []
        losses, means = [], []
        for batch in micro_batches:
            loss_B = self.objective.loss(self.engine, batch.to(self.device))
            loss = loss_B.mean()
            self.engine.backward(loss, batch.num_micro_batches)
            means.append(loss.item())
            losses.append(loss_B.detach())
            clip_ids += batch.ids
        norm, local_norm = float(self.engine.gradient_norm()), self.local_norm.take()
        return StepGradients(tuple(clip_ids), tuple(losses), sum(means) / len(means), norm, local_norm)

    def recompute(
        self, micro_batches: Iterable[Batch], first: StepGradients, tolerance: float
    ) -> tuple[StepGradients, FaultCause]:
        """Compute a step again in place of `first`, and compare the two. All ranks call it together.

        Noise and dropout are functions of the sample ordinal, so both computations draw the same.

        Args:
            tolerance: largest relative difference of two healthy computations (guard.recompute_tolerance).
        """
        self.engine.discard_gradients()
        self.objective.discard()
        second = self.compute(micro_batches)
        (losses, norm), (losses_again, norm_again) = first.numbers(), second.numbers()
        norms = None if norm is None or norm_again is None else (norm, norm_again)
        ranks = all_gather_objects(
            [Recomputation(self.rank, host(), first.clip_ids, (losses, losses_again), norms)]
        )
        cause = find_cause(ranks, (first.grad_norm, second.grad_norm), tolerance)
        if cause.hardware:
            # A later wrong gradient is then traced to its rank, too.
            self.local_norm.start()
        return second, cause
