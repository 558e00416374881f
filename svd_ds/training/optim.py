"""Optimiser settings: parameter groups, and the learning rate schedule.

The paper gives the optimiser (AdamW) and the learning rates, but no betas, weight decay, warm-up or clipping.
Schedules are pure functions of the number of samples seen, so they do not depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from svd_ds.settings import Settings, choice, number

TAGS = ("spatial", "temporal", "embedding", "condition")
"""Tags of the networks' parameters (svd_ds/model/unet.py, `parameter_tags`)."""

SCHEDULES = ("constant", "cosine", "zero")


@dataclass(frozen=True)
class OptimConfig(Settings, section="optim"):
    """AdamW, its learning rate for each part of the network, and the schedule."""

    lr: float = number(
        1e-4, gt=0, le=100, hint="optim.schedule=zero moves no weight: it only evaluates and samples"
    )
    """Peak learning rate. Each part of the network has this rate times its lr_scale."""
    spatial_lr_scale: float = number(1.0, ge=0, le=10_000)
    """Multiplier of optim.lr for the spatial layers, those of the image model; 0 freezes them."""
    temporal_lr_scale: float = number(1.0, ge=0, le=10_000)
    """Multiplier of optim.lr for the temporal layers; 0 freezes them."""
    embedding_lr_scale: float = number(1.0, ge=0, le=10_000)
    """Multiplier of optim.lr for the embedding of the noise level, which image models also have; 0 freezes
    it."""
    condition_lr_scale: float = number(1.0, ge=0, le=10_000)
    """Multiplier of optim.lr for the embeddings of scalars and mask, which image models lack; 0 freezes
    them."""
    beta1: float = number(0.9, ge=0, lt=1)
    """Decay per step of AdamW's first moment."""
    beta2: float = number(0.999, ge=0, lt=1)
    """Decay per step of AdamW's second moment."""
    eps: float = number(1e-8, gt=0, le=1)
    """Term added to AdamW's denominator."""
    weight_decay: float = number(0.01, ge=0, le=100)
    """Decoupled weight decay of matrices and kernels; norms, biases and mix factors have none."""
    gradient_clip: float = number(1.0, gt=0)
    """Largest global gradient norm; larger gradients are scaled down to it."""
    schedule: str = choice("constant", SCHEDULES)
    """Learning rate after the warm-up: constant | cosine (down to optim.final_lr_scale) | zero (weights do
    not change: the run only evaluates and samples)."""
    warmup_samples: int = number(0, ge=0)
    """Clips over which the learning rate rises linearly from 0; 0 is no warm-up."""
    final_lr_scale: float = number(0.0, ge=0, le=1)
    """Learning rate at the end of the cosine schedule, as a fraction of the peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(self.lr_scale(tag) > 0 for tag in TAGS):
            keys = ", ".join(f"optim.{tag}_lr_scale" for tag in TAGS)
            raise ValueError(f"{keys} are all 0: at least 1 must be above 0, or all layers are frozen")

    def lr_scale(self, tag: str) -> float:
        """Return the multiplier of the learning rate for parameters with a tag, one of TAGS."""
        return getattr(self, f"{tag}_lr_scale")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay."""

    name: str
    weight_decay: float
    parameter_names: tuple[str, ...]
    """Names of the parameters in the group."""


def parameter_groups(
    tags: Mapping[str, str], shapes: Mapping[str, Sequence[int]], config: OptimConfig
) -> list[ParameterGroup]:
    """Group parameters by tag and by weight decay; frozen parameters are in no group.

    Args:
        tags: parameter name -> one of TAGS.
        shapes: parameter name -> full shape.
    """
    names_by_group: dict[tuple[str, bool], list[str]] = {}
    for name, tag in tags.items():
        if config.lr_scale(tag) > 0:
            decays = len(shapes[name]) > 1
            names_by_group.setdefault((tag, decays), []).append(name)
    return [
        ParameterGroup(
            name=_group_name(tag, decays),
            weight_decay=config.weight_decay if decays else 0.0,
            parameter_names=tuple(names),
        )
        for (tag, decays), names in sorted(names_by_group.items())
    ]


def group_lrs(config: OptimConfig, peak: float) -> dict[str, float]:
    """Return group name -> learning rate, which is `peak` times the lr_scale of the group's tag."""
    return {
        name: peak * config.lr_scale(tag)
        for tag in TAGS
        for name in (_group_name(tag, True), _group_name(tag, False))
    }


def learning_rate(config: OptimConfig, samples: int, total_samples: int) -> float:
    """Return the learning rate, before lr_scale, of the step after which `samples` clips have been seen.

    Args:
        samples: clips seen at the end of the step, so that the first step of a warm-up changes weights.
        total_samples: clips of the whole run.
    """
    if config.schedule == "zero":
        return 0.0
    if samples < config.warmup_samples:
        return config.lr * samples / config.warmup_samples
    if config.schedule == "constant":
        return config.lr
    decay_samples = max(1, total_samples - config.warmup_samples)
    progress = min(1.0, (samples - config.warmup_samples) / decay_samples)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_scale + (1 - config.final_lr_scale) * cosine)


def _group_name(tag: str, decays: bool) -> str:
    return tag if decays else f"{tag}-no-decay"
