"""Forward and backward passes of a step; the gradients stay in the engine.

The losses stay on the device until the whole step is queued: `read_scalars` then waits for it, once a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from svd_ds.batch import Batch
from svd_ds.data.cursor import Cursor
from svd_ds.data.quarantine import Fault
from svd_ds.parallel.collectives import all_gather_objects
from svd_ds.parallel.engine import Engine
from svd_ds.parallel.env import host
from svd_ds.parallel.local_norm import LocalNorm
from svd_ds.training.fault_cause import FaultCause, Recomputation, find_cause
from svd_ds.training.objectives.base import Objective
from svd_ds.training.prefetch import PrefetchedBatch
from svd_ds.training.usage import StageTimer


class StepBatches:
    """The micro-batches of one step, read lazily by iteration."""

    def __init__(self, batches: Iterator[PrefetchedBatch], timer: StageTimer) -> None:
        self._batches, self._timer = batches, timer
        self.read: list[Batch] = []
        """Micro-batches read so far, in host memory."""
        self.cursor: Cursor
        """Cursor after the step."""
        self.faults: list[Fault] = []
        """Samples that were replaced in the micro-batches read so far."""

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the micro-batches on the device."""
        while not self.read or len(self.read) < self.read[-1].num_micro_batches:
            with self._timer("data"):
                batch = next(self._batches)
            self.read.append(batch.host)
            self.cursor = batch.cursor
            self.faults += batch.faults
            yield batch.on_device


@dataclass(frozen=True)
class StepNumbers:
    """Numbers of one computation of a step, on the host."""

    loss: float
    """Mean loss."""
    grad_norm: float
    """Gradient norm over all ranks."""
    terms: Mapping[str, float]
    """Scalars of `Objective.reduce_terms`."""


@dataclass(frozen=True)
class StepGradients:
    """Losses and gradient norms of one computation of a step, on the device."""

    clip_ids: tuple[str, ...]
    """Ids of this rank's clips."""
    losses: tuple[Tensor, ...]
    """Losses of this rank's micro-batches, each (B,)."""
    means: tuple[Tensor, ...]
    """Their means, scalars."""
    grad_norm: Tensor
    """Gradient norm over all ranks, a scalar."""
    terms: Mapping[str, Tensor]
    """Scalars of `Objective.reduce_terms`."""
    local_norm: Tensor | None
    """Norm of this rank's own gradient; None unless `LocalNorm` is on."""

    @cached_property
    def numbers(self) -> StepNumbers:
        """Numbers of the step, copied from the device at the first access; the loss is this rank's."""
        values = read_scalars([*self.means, self.grad_norm, *self.terms.values()])
        means, (norm, *terms) = values[: len(self.means)], values[len(self.means) :]
        return StepNumbers(sum(means) / len(means), norm, dict(zip(self.terms, terms, strict=True)))

    def read_losses(self) -> tuple[tuple[float, ...], float | None]:
        """Copy the loss of each clip, and the norm of this rank's own gradient, from the device."""
        norm = None if self.local_norm is None else self.local_norm.item()
        return tuple(torch.cat(self.losses).tolist()), norm


def read_scalars(scalars: Sequence[Tensor]) -> list[float]:
    """Copy scalars from the device in one copy, which waits for all work before it.

    It is the one host read of a training step: any other would make the GPU idle while the host prepares the
    work that follows.
    """
    device = scalars[0].device
    return torch.stack([scalar.detach().to(device, torch.float64) for scalar in scalars]).tolist()


@dataclass(frozen=True)
class GradientComputation:
    """Computes the gradients of a step, and computes them again if the guard finds them out of bounds."""

    engine: Engine
    objective: Objective
    local_norm: LocalNorm
    rank: int
    device: torch.device

    def compute(self, micro_batches: Iterable[Batch]) -> StepGradients:
        """Run the forward and backward pass of each micro-batch of a step. All ranks call it together.

        Nothing here waits for the device.
        """
        clip_ids: list[str] = []
        losses, means = [], []
        for batch in micro_batches:
            loss_B = self.objective.loss(self.engine, batch.to(self.device))
            loss = loss_B.mean()
            self.engine.backward(loss, batch.num_micro_batches)
            means.append(loss.detach())
            losses.append(loss_B.detach())
            clip_ids += batch.ids
        return StepGradients(
            clip_ids=tuple(clip_ids),
            losses=tuple(losses),
            means=tuple(means),
            grad_norm=self.engine.gradient_norm(),
            terms=self.objective.reduce_terms(),
            local_norm=self.local_norm.take(),
        )

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
        (losses, norm), (losses_again, norm_again) = first.read_losses(), second.read_losses()
        norms = None if norm is None or norm_again is None else (norm, norm_again)
        ranks = all_gather_objects(
            [Recomputation(self.rank, host(), first.clip_ids, (losses, losses_again), norms)]
        )
        cause = find_cause(ranks, (first.numbers.grad_norm, second.numbers.grad_norm), tolerance)
        if cause.hardware:
            # A later wrong gradient is then traced to its rank, too.
            self.local_norm.start()
        return second, cause
