"""How well the network does at each noise level, on a set that is the same in every run.

The set is fixed triples (clip, sigma, noise): the first clips of one order of the data, whole frames, each at
one sigma in each of NUM_BINS equal bins of ln sigma, with one noise of its own and no condition dropped. They
depend on the data and on the size of clips, and on nothing else of a run: not its seed, not its training
density of sigma, not how many ranks it has. Every run is measured by one error, that of v at weight 1,
whatever it minimises. So two members of an ablation differ here by what they learned alone.

Its clips are the training data's own, which the run sees with other crops, sigmas and noises, unless
`evaluation.path` names shards that are held out.

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
"""Of the set: its clips, their first frames, its noises."""
NUM_BINS = 10
SIGMA_MIN, SIGMA_MAX = 0.002, 700.0
"""What sampling descends with the public weights (Stability-AI/generative-models SVD configs): each bin is a
factor of 3.6, wide enough for every training density, and its number means the same sigmas in every run."""


@dataclass(frozen=True)
class EvaluationConfig(Settings, section="evaluation"):
    every: int = number(1000, ge=0)
    """Steps between evaluations; the last step always has one. 0: none at all. One costs as much as training
    on ten times its clips, and a third more for the averaged weights."""
    clips: int = number(16, ge=1, le=2**20)
    """Size of the fixed set. Runs are comparable where it is the same."""
    frame_gradients: bool = True
    """Measure the gradient of each frame's loss too: as many further passes over the clips as these have
    frames."""
    path: str | None = location(None)
    """Folder of shards of its own, which the run does not train on; null takes the training data."""


@dataclass(frozen=True)
class EvalResult:
    """One evaluation. A list has a number a bin, from the smallest sigma to the largest."""

    set: str
    """Names the fixed set: numbers of one set can be compared."""
    clips: int
    sigma: list[float]
    """Geometric middle of each bin."""
    loss: list[float]
    loss_average: list[float]
    """Of the first average of the weights, from which samples are drawn."""
    grad_norm: list[float]
    """Norm over all trained parameters of the gradient of `loss`."""
    loss_by_frame: list[float]
    """The mean over the bins, a number a frame."""
    grad_norm_by_frame: list[float]
    """Norm of the gradient of a frame's loss, a number a frame, each clip in one bin, the next clip in the
    next. Empty without `frame_gradients`."""


@dataclass(frozen=True)
class FixedSet:
    data: str
    """Names the clips and how they are read."""
    clips: Batch
    """This rank's, as many on every rank. Their ordinals are their numbers in the set: one beyond its end,
    where the ranks do not divide it, counts nothing."""


@dataclass(frozen=True)
class Evaluation:
    """Measures on the fixed set; the ranks share its clips out."""

    config: EvaluationConfig
    fixed_set: FixedSet
    micro_batch: int
    """Clips that a rank takes at once."""
    diffusion: DiffusionObjective
    env: Env

    def __post_init__(self) -> None:
        assert self.diffusion.seed == SEED and self.diffusion.offset_noise == 0, "the set's own noise"

    def measure(self, engine: Engine, ema: ShardEMA) -> EvalResult:
        """Measure the weights and their first average. All ranks call it, between two steps; the training
        goes on as if it had not happened. The same on every rank."""
        clips = self.fixed_set.clips
        micro_batches = [
            clips.select(range(len(clips))[start : start + self.micro_batch]).to(self.env.device)
            for start in range(0, len(clips), self.micro_batch)
        ]
        prepared = [(batch.ordinals, self.diffusion.prepare(batch)) for batch in micro_batches]
        bins = [self._gradient(engine, prepared, s) for s in range(NUM_BINS)]
        errors_BST = torch.stack([errors_BT for errors_BT, _ in bins], dim=1)
        num_frames = errors_BST.shape[-1] if self.config.frame_gradients else 0
        frames = [self._gradient(engine, prepared, None, slice(t, t + 1)) for t in range(num_frames)]
        with torch.no_grad(), engine.weights(ema.shards(ema.config.names[0])):
            average_BST = torch.stack(
                [torch.cat([self._errors(engine, *part, s) for part in prepared]) for s in range(NUM_BINS)], 1
            )
        losses_ST, averages_ST = self._mean_over_clips(errors_BST), self._mean_over_clips(average_BST)
        return EvalResult(
            set=self._name(),
            clips=self.config.clips,
            sigma=[sigma_at(s, 0.5) for s in range(NUM_BINS)],
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
        s: int | None,
        frames: slice = slice(None),
    ) -> tuple[Tensor, float]:
        """Errors of this rank's clips in bin `s`, (B, T), and the norm of the gradient of the whole set's
        loss at `frames`. None: each clip in one bin, the next clip in the next."""
        # The engine averages over ranks and micro-batches, and they may hold clips that do not count.
        share = self.env.world * len(prepared) / self.config.clips
        parts = []
        for ordinals, known in prepared:
            errors_BT = self._errors(engine, ordinals, known, s)
            counts_B = errors_BT.new_tensor([ordinal < self.config.clips for ordinal in ordinals])
            loss = share * (counts_B * errors_BT[:, frames].mean(dim=1)).sum()
            engine.backward(loss, len(prepared))
            parts.append(errors_BT.detach())
        norm = engine.gradient_norm()
        engine.discard_gradients()
        return torch.cat(parts), norm

    def _errors(
        self, engine: Engine, ordinals: tuple[int, ...], known: PreparedBatch, s: int | None
    ) -> Tensor:
        # Each clip stands elsewhere in the bin, so that together they fill it evenly.
        places = [((ordinal % self.config.clips) + 0.5) / self.config.clips for ordinal in ordinals]
        bins = [ordinal % NUM_BINS if s is None else s for ordinal in ordinals]
        sigma_B = known.u_B.new_tensor([sigma_at(*at) for at in zip(bins, places, strict=True)])
        return self.diffusion.errors(engine, known, sigma_B)

    def _mean_over_clips(self, errors_BST: Tensor) -> Tensor:
        """This rank's errors -> (S, T), in float64, summed in the order of the set on any number of ranks."""
        device = errors_BST.device
        ordinals = all_gather_cat(torch.tensor(self.fixed_set.clips.ordinals, device=device))
        order = ordinals.argsort()[: self.config.clips]
        return all_gather_cat(errors_BST)[order].double().mean(dim=0)

    def _name(self) -> str:
        described = f"{self.fixed_set.data} {self.config.clips} {SEED} {NUM_BINS} {SIGMA_MIN} {SIGMA_MAX}"
        return hashlib.sha256(described.encode()).hexdigest()[:12]


def as_eval_objective(diffusion: DiffusionObjective) -> DiffusionObjective:
    """A run's diffusion with the set's noises, and no condition dropped."""
    conditioner = diffusion.conditioner
    undropped = replace(conditioner.config, drop_context=0.0, drop_text=0.0, drop_concat=0.0, drop_scalars={})
    return replace(diffusion, offset_noise=0.0, seed=SEED, conditioner=conditioner.configured(undropped))


def sigma_at(s: int, place: float) -> float:
    """The sigma at `place`, from 0 to 1, of bin `s`."""
    low, high = math.log(SIGMA_MIN), math.log(SIGMA_MAX)
    return math.exp(low + (high - low) * (s + place) / NUM_BINS)
