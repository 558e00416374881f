"""Exponential moving averages of the weights, on each rank's own float32 shard.

Nothing is gathered: the average of a shard is the shard of the average. Two kinds of profile:
- power functions (Karras et al. 2024, arXiv 2312.02696, section 3.1), whose width is a fixed share of the
  run, so that early weights are forgotten at any run length;
- a constant decay a step, for the paper's finetunes (0.9999, arXiv 2311.15127 section D.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from svd_ds.settings import Settings, number
from svd_ds.weights.posthoc_ema import power_exponent


@dataclass(frozen=True)
class EMAConfig(Settings, section="ema"):
    lengths: tuple[float, ...] = number((0.05, 0.10), ge=0.001, le=0.28)
    """Relative standard deviations sigma_rel of power-function profiles."""
    decays: tuple[float, ...] = number((), gt=0, lt=1)
    """Constant decays a step, as in 0.9999."""
    on_host: bool = False
    """Keep the averages in host memory: a GPU then has 4 bytes a weight of its shard and profile more, and
    every step waits for the weights to be copied."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names:
            raise ValueError(
                "ema has no profile: samples are drawn from averaged weights, so give one length or decay"
            )
        for name in self.names:
            if self.names.count(name) > 1:
                raise ValueError(
                    f"ema.lengths is {list(self.lengths)} and ema.decays {list(self.decays)}: two of them "
                    f"have the name {name}, and each average needs a name of its own"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """A name a profile, the one that samples are drawn from first."""
        return tuple(f"decay-{decay:g}" for decay in self.decays) + tuple(
            f"power-{np.format_float_positional(length, min_digits=3)}" for length in self.lengths
        )


class ShardEMA:
    """The averages of one rank's shards.

    shards: parameter name -> flat float32 view of this rank's shard of the master weights, kept up to date by
    the optimiser.
    """

    def __init__(self, config: EMAConfig, shards: Mapping[str, Tensor]) -> None:
        self.config = config
        self.names = list(shards)
        self.averages = {
            name: [
                shard.detach().to("cpu" if config.on_host else shard.device, copy=True)
                for shard in shards.values()
            ]
            for name in config.names
        }

    def decay_of(self, samples: int, batch: int) -> dict[str, float]:
        """Decay of each profile for the step that ended at `samples` clips and consumed `batch` of them."""
        constant = dict(zip(self.config.names, self.config.decays, strict=False))
        power = {
            name: (1 - batch / samples) ** (power_exponent(length) + 1)
            for name, length in zip(self.config.names[len(constant) :], self.config.lengths, strict=True)
        }
        return constant | power

    @torch.no_grad()
    def update(self, shards: Mapping[str, Tensor], samples: int, batch: int) -> None:
        """Move every average towards the weights after a step; arguments as `decay_of`."""
        weights = [shards[name] for name in self.names]
        if self.config.on_host:
            weights = [weight.cpu() for weight in weights]
        for profile, decay in self.decay_of(samples, batch).items():
            torch._foreach_lerp_(self.averages[profile], weights, 1 - decay)

    def shards(self, profile: str) -> dict[str, Tensor]:
        """Parameter name -> this rank's flat float32 shard of the average."""
        return dict(zip(self.names, self.averages[profile], strict=True))

    @torch.no_grad()
    def load(self, profile: str, shards: Mapping[str, Tensor]) -> None:
        for name, average in zip(self.names, self.averages[profile], strict=True):
            average.copy_(shards[name])
