"""Exponential moving averages of the weights, on each rank's own float32 shard.

Nothing is gathered: the average of a shard is the shard of the average. There are two kinds of profile:
- power functions (Karras et al. 2024, arXiv 2312.02696, section 3.1), whose width is a fixed share of the
  run, so that the weight of early steps vanishes at any run length;
- a constant decay per step, as in the paper's finetunes (0.9999, arXiv 2311.15127 section D.3).
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
    """Averages of the weights. Samples are drawn from the first one; decays are counted before lengths."""

    lengths: tuple[float, ...] = number((0.05, 0.10), ge=0.001, le=0.28)
    """Lengths of power-function averages: relative standard deviations (sigma_rel of EDM2), so 0.05 is 5 % of
    the run."""
    decays: tuple[float, ...] = number((), gt=0, lt=1)
    """Decays per step of averages with a constant decay, such as 0.9999."""
    on_host: bool = False
    """Keep the averages in host memory. It saves 4 bytes of GPU memory per weight of the rank's shard and per
    average; every step then waits for a copy of the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names:
            raise ValueError(
                "ema.lengths and ema.decays are both empty: samples are drawn from averaged weights, so give "
                "at least 1 length or decay"
            )
        for name in self.names:
            if self.names.count(name) > 1:
                raise ValueError(
                    f"ema.lengths is {list(self.lengths)} and ema.decays is {list(self.decays)}: two of the "
                    f"averages have the name {name}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each profile; samples are drawn from the first one."""
        return tuple(f"decay-{decay:g}" for decay in self.decays) + tuple(
            f"power-{np.format_float_positional(length, min_digits=3)}" for length in self.lengths
        )


class ShardEMA:
    """Averages of one rank's shards."""

    def __init__(self, config: EMAConfig, shards: Mapping[str, Tensor]) -> None:
        """
        Args:
            shards: parameter name -> flat float32 shard of the master weights of this rank; the averages
                begin as copies of them.
        """
        self.config = config
        self.names = list(shards)
        self.averages = {
            name: [
                shard.detach().to("cpu" if config.on_host else shard.device, copy=True)
                for shard in shards.values()
            ]
            for name in config.names
        }

    def step_decays(self, samples: int, batch: int) -> dict[str, float]:
        """Return the decay of each profile for one step.

        Args:
            samples: number of clips seen at the end of the step.
            batch: number of clips in the step.
        """
        constant = dict(zip(self.config.names, self.config.decays, strict=False))
        power = {
            name: (1 - batch / samples) ** (power_exponent(length) + 1)
            for name, length in zip(self.config.names[len(constant) :], self.config.lengths, strict=True)
        }
        return constant | power

    @torch.no_grad()
    def update(self, shards: Mapping[str, Tensor], samples: int, batch: int) -> None:
        """Move every average towards the weights after a step.

        Args:
            shards: parameter name -> this rank's shard of the weights.
            samples: number of clips seen at the end of the step.
            batch: number of clips in the step.
        """
        weights = [shards[name] for name in self.names]
        if self.config.on_host:
            weights = [weight.cpu() for weight in weights]
        for profile, decay in self.step_decays(samples, batch).items():
            torch._foreach_lerp_(self.averages[profile], weights, 1 - decay)

    def shards(self, profile: str) -> dict[str, Tensor]:
        """Return parameter name -> this rank's flat float32 shard of the average."""
        return dict(zip(self.names, self.averages[profile], strict=True))

    @torch.no_grad()
    def load(self, profile: str, shards: Mapping[str, Tensor]) -> None:
        """Overwrite the average of `profile` with the given shards."""
        for name, average in zip(self.names, self.averages[profile], strict=True):
            average.copy_(shards[name])
