"""Evaluation: the loss at each noise level, on a fixed set that is the same in every run.

The set consists of fixed triples (clip, sigma, noise): the first clips of one order of the data, uncropped,
each at one sigma in each of NUM_BINS equal bins of ln sigma, with one fixed noise and no condition dropped.
The triples depend on the data and on the size of the clips only: not on the seed of a run, its training
density of sigma, or its number of ranks. Every run is measured by the squared error of v at weight 1,
whatever loss it minimises. Therefore the results of two members of an ablation differ only because their
networks differ.

The clips are from the training data, which the run sees with other crops, sigmas and noises, unless
`evaluation.path` names held-out shards.

Shape legend: B clips, T frames, S bins of sigma.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svd_ds.batch import Batch
from svd_ds.parallel.collectives import all_gather_cat
from svd_ds.parallel.engine import Engine
from svd_ds.parallel.env import Env
from svd_ds.settings import Settings, location, number
from svd_ds.training.ema import ShardEMA
from svd_ds.training.objectives.diffusion import DiffusionObjective, PreparedBatch

SEED = 23
"""Seed of the fixed set: its clips, their first frames, its noises."""
NUM_BINS = 10
"""Number of bins of ln sigma."""
SIGMA_MIN, SIGMA_MAX = 0.002, 700.0
"""Range of sigma in sampling with the public weights (Stability-AI/generative-models SVD configs). A bin
spans a factor of 3.6; the range covers every training density, so a bin means the same sigmas in every
run."""


@dataclass(frozen=True)
class EvaluationConfig(Settings, section="evaluation"):
    """Interval of the evaluations, and the clips that they use."""

    every: int = number(1000, ge=0)
    """Steps between evaluations; the last step always has one. 0 switches evaluation off. An evaluation costs
    as much as training on ten times its clips, and a third more for the averaged weights."""
    clips: int = number(16, ge=1, le=2**20)
    """Number of clips in the fixed set. Only runs with the same number can be compared."""
    frame_gradients: bool = True
    """Also measure the norm of the gradient of each frame's loss. This takes one more pass over the clips for
    each frame."""
    path: str | None = location(None)
    """Folder or URL of held-out shards; null evaluates on clips of the training data."""


@dataclass(frozen=True)
class EvalResult:
    """Results of one evaluation. Lists by bin run from the smallest sigma to the largest."""

    set: str
    """Fingerprint of the fixed set: only results on the same set can be compared."""
    clips: int
    """Number of clips in the set."""
    sigma: list[float]
    """Geometric mean of each bin."""
    loss: list[float]
    """Mean squared error of v in each bin."""
    loss_average: list[float]
    """Loss in each bin with the first average of the weights, from which samples are drawn."""
    grad_norm: list[float]
    """Norm of the gradient of the loss in each bin, over all trained parameters."""
    loss_by_frame: list[float]
    """Loss of each frame, averaged over the bins."""
    grad_norm_by_frame: list[float]
    """Norm of the gradient of each frame's loss; clip i is in bin i mod NUM_BINS. Empty if
    evaluation.frame_gradients is false."""


@dataclass(frozen=True)
class FixedSet:
    """One rank's part of the fixed set."""

    data: str
    """Fingerprint of the clips and of how they are read."""
    clips: Batch
    """Clips of this rank, the same number on every rank. Their ordinals are their indices in the set. If the
    number of ranks does not divide the set, the last ranks have clips beyond its end, which do not count."""


@dataclass(frozen=True)
class Evaluation:
    """Evaluates the network on the fixed set, whose clips are divided over the ranks."""

    config: EvaluationConfig
    fixed_set: FixedSet
    micro_batch: int
    """Clips of a rank in one forward pass."""
    diffusion: DiffusionObjective
    env: Env

    def __post_init__(self) -> None:
        assert self.diffusion.seed == SEED and self.diffusion.offset_noise == 0, "not the noise of the set"

    def measure(self, engine: Engine, ema: ShardEMA) -> EvalResult:
        """Evaluate the weights and their first average. All ranks call it, between two steps.

        Training is not affected.

        Returns:
            The same results on every rank.
        """
        clips = self.fixed_set.clips
        micro_batches = [
            clips.select(range(len(clips))[start : start + self.micro_batch]).to(self.env.device)
            for start in range(0, len(clips), self.micro_batch)
        ]
        prepared = [(batch.ordinals, self.diffusion.prepare(batch)) for batch in micro_batches]
        bins = [self._gradient(engine, prepared, index) for index in range(NUM_BINS)]
        errors_BST = torch.stack([errors_BT for errors_BT, _ in bins], dim=1)
        num_frames = errors_BST.shape[-1] if self.config.frame_gradients else 0
        frames = [self._gradient(engine, prepared, None, slice(t, t + 1)) for t in range(num_frames)]
        with torch.no_grad(), engine.weights(ema.shards(ema.config.names[0])):
            average_BST = torch.stack(
                [torch.cat([self._errors(engine, *part, i) for part in prepared]) for i in range(NUM_BINS)], 1
            )
        losses_ST, averages_ST = self._mean_over_clips(errors_BST), self._mean_over_clips(average_BST)
        return EvalResult(
            set=self._name(),
            clips=self.config.clips,
            sigma=[sigma_in_bin(index, 0.5) for index in range(NUM_BINS)],
            loss=losses_ST.mean(dim=1).tolist(),
            loss_average=averages_ST.mean(dim=1).tolist(),
            grad_norm=[norm for _, norm in bins],
            loss_by_frame=losses_ST.mean(dim=0).tolist(),
            grad_norm_by_frame=[norm for _, norm in frames],
        )

    def _gradient(
        self,
        engine: Engine,
        prepared: list[tuple[tuple[int, ...], PreparedBatch]],
        bin_index: int | None,
        frames: slice = slice(None),
    ) -> tuple[Tensor, float]:
        """Compute errors and the norm of their gradient in one bin.

        Args:
            prepared: (ordinals, prepared batch) of each micro-batch of this rank.
            bin_index: bin of sigma; None puts clip i into bin i mod NUM_BINS.
            frames: frames whose errors make up the loss.

        Returns:
            Errors of this rank's clips, (B, T), and the gradient norm of the mean loss of the whole set.
        """
        # The engine averages over ranks and micro-batches, which may hold clips beyond the end of the set.
        share = self.env.world * len(prepared) / self.config.clips
        parts = []
        for ordinals, batch in prepared:
            errors_BT = self._errors(engine, ordinals, batch, bin_index)
            counts_B = errors_BT.new_tensor([ordinal < self.config.clips for ordinal in ordinals])
            loss = share * (counts_B * errors_BT[:, frames].mean(dim=1)).sum()
            engine.backward(loss, len(prepared))
            parts.append(errors_BT.detach())
        norm = float(engine.gradient_norm())
        engine.discard_gradients()
        return torch.cat(parts), norm

    def _errors(
        self, engine: Engine, ordinals: tuple[int, ...], batch: PreparedBatch, bin_index: int | None
    ) -> Tensor:
        # Each clip has a different sigma within the bin, so that the clips cover the bin evenly.
        fractions = [((ordinal % self.config.clips) + 0.5) / self.config.clips for ordinal in ordinals]
        bins = [ordinal % NUM_BINS if bin_index is None else bin_index for ordinal in ordinals]
        sigmas = [sigma_in_bin(index, fraction) for index, fraction in zip(bins, fractions, strict=True)]
        return self.diffusion.errors(engine, batch, batch.u_B.new_tensor(sigmas))

    def _mean_over_clips(self, errors_BST: Tensor) -> Tensor:
        """Average the errors of all ranks to (S, T), in float64.

        Clips are summed in the order of the set, so the result does not depend on the number of ranks.
        """
        device = errors_BST.device
        ordinals = all_gather_cat(torch.tensor(self.fixed_set.clips.ordinals, device=device))
        order = ordinals.argsort()[: self.config.clips]
        return all_gather_cat(errors_BST)[order].double().mean(dim=0)

    def _name(self) -> str:
        described = f"{self.fixed_set.data} {self.config.clips} {SEED} {NUM_BINS} {SIGMA_MIN} {SIGMA_MAX}"
        return hashlib.sha256(described.encode()).hexdigest()[:12]


def as_eval_objective(diffusion: DiffusionObjective) -> DiffusionObjective:
    """Return a run's diffusion objective with the noises of the fixed set, and no condition dropped."""
    conditioner = diffusion.conditioner
    undropped = replace(conditioner.config, drop_context=0.0, drop_text=0.0, drop_concat=0.0, drop_scalars={})
    return replace(diffusion, offset_noise=0.0, seed=SEED, conditioner=conditioner.with_config(undropped))


def sigma_in_bin(index: int, fraction: float) -> float:
    """Return the sigma at a fraction (0 to 1) of the width of a bin of ln sigma."""
    low, high = math.log(SIGMA_MIN), math.log(SIGMA_MAX)
    return math.exp(low + (high - low) * (index + fraction) / NUM_BINS)
