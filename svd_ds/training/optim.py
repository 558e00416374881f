"""Which parameters learn, how fast, and when.

The paper gives the optimiser (AdamW) and the rates, and says nothing of betas, decay, warm-up or clipping.
Schedules are pure functions of the number of samples seen, so that they do not depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from svd_ds.settings import Settings, choice, number

TAGS = ("spatial", "temporal", "embedding", "condition")
"""As the networks have them on their parameters (svd_ds/model/unet.py, `parameter_tags`)."""

SCHEDULES = ("constant", "cosine", "zero")


@dataclass(frozen=True)
class OptimConfig(Settings, section="optim"):
    lr: float = number(
        1e-4, gt=0, le=100, hint="optim.schedule=zero moves no weight: it only evaluates and samples"
    )
    """Peak learning rate, multiplied per group by the rates below."""
    spatial_lr_scale: float = number(1.0, ge=0, le=10_000)
    """Multiplier for the layers that an image model has; 0 freezes them."""
    temporal_lr_scale: float = number(1.0, ge=0, le=10_000)
    """Multiplier for the layers that video adds; 0 freezes them."""
    embedding_lr_scale: float = number(1.0, ge=0, le=10_000)
    """Multiplier for the embedding of the noise level, which an image model has as well; 0 freezes it."""
    condition_lr_scale: float = number(1.0, ge=0, le=10_000)
    """Multiplier for the embeddings of scalars and mask, which video adds; 0 freezes them."""
    beta1: float = number(0.9, ge=0, lt=1)
    beta2: float = number(0.999, ge=0, lt=1)
    eps: float = number(1e-8, gt=0, le=1)
    weight_decay: float = number(0.01, ge=0, le=100)
    """Decoupled decay of matrices and kernels; norms, biases and mix factors have none."""
    gradient_clip: float = number(1.0, gt=0)
    """Largest global gradient norm."""
    schedule: str = choice("constant", SCHEDULES)
    """constant | cosine, after the warm-up | zero (no weight moves: a run only evaluates and samples)."""
    warmup_samples: int = number(0, ge=0)
    """The rate rises linearly over this many clips."""
    final_lr_scale: float = number(0.0, ge=0, le=1)
    """Where cosine ends, as a share of the peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(self.rate(tag) > 0 for tag in TAGS):
            raise ValueError(f"optim freezes everything: {'_lr_scale, '.join(TAGS)}_lr_scale are all 0")

    def rate(self, tag: str) -> float:
        """The multiplier for parameters of `tag`, one of TAGS."""
        return getattr(self, f"{tag}_lr_scale")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay."""

    name: str
    weight_decay: float
    members: tuple[str, ...]
    """Names of parameters."""


def parameter_groups(
    tags: Mapping[str, str], shapes: Mapping[str, Sequence[int]], config: OptimConfig
) -> list[ParameterGroup]:
    """Sort parameters into groups by tag and by whether they decay; frozen ones are in no group.

    tags: parameter name -> one of TAGS. shapes: parameter name -> full shape.
    """
    members: dict[tuple[str, bool], list[str]] = {}
    for name, tag in tags.items():
        if config.rate(tag) > 0:
            decays = len(shapes[name]) > 1
            members.setdefault((tag, decays), []).append(name)
    return [
        ParameterGroup(
            name=_group_name(tag, decays),
            weight_decay=config.weight_decay if decays else 0.0,
            members=tuple(names),
        )
        for (tag, decays), names in sorted(members.items())
    ]


def group_lrs(config: OptimConfig, peak: float) -> dict[str, float]:
    """Group name -> learning rate, when the peak group has `peak`."""
    return {
        name: peak * config.rate(tag)
        for tag in TAGS
        for name in (_group_name(tag, True), _group_name(tag, False))
    }


def learning_rate(config: OptimConfig, samples: int, total_samples: int) -> float:
    """The peak rate once `samples` clips of a run of `total_samples` have been seen.

    A step asks with the count that it will have reached at its end, so that the first step of a warm-up
    moves.
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
