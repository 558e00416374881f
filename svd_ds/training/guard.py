"""The guard against loss spikes: a step that lies far above the run's recent level is left out.

It judges a step after its last backward and before the optimiser, from two numbers that are the same on all
ranks: the loss and the gradient's norm. What it remembers is part of `Progress`, so a resumed run decides the
same.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from svd_ds.parallel.collectives import SharedError


@dataclass(frozen=True)
class GuardConfig:
    """A step that is not finite is always skipped."""

    loss_factor: float = 20.0
    """Skip a step whose loss is above so many times the recent median; 0 never does. A network that says
    nothing has a v-space loss of about 1 at every noise level: at 20 times a good median, 0.05, all that was
    learned is lost."""
    norm_factor: float = 50.0
    """The same for the gradient's norm before clipping; 0 never does. It moves far more than the loss."""
    window: int = 100
    """Steps of which the median is taken. As long as there are fewer, only what is not finite is skipped."""
    max_skips: int = 5
    """The run ends when more steps than these would be skipped in a row."""

    def __post_init__(self) -> None:
        for name in ("loss_factor", "norm_factor"):
            if (factor := getattr(self, name)) != 0 and factor <= 1:
                raise ValueError(f"guard.{name} is {factor}: it must be above 1, or 0 to switch it off")
        if self.window < 1 or self.max_skips < 0:
            raise ValueError(
                f"guard.window is {self.window} and guard.max_skips {self.max_skips}: they must be at least "
                "1 and 0"
            )


@dataclass(frozen=True)
class GuardState:
    """What the guard remembers of the steps before."""

    losses: tuple[float, ...] = ()
    """Of the last steps that were taken, oldest first, at most a window of them."""
    norms: tuple[float, ...] = ()
    skipped: int = 0
    """Steps skipped in all."""
    in_a_row: int = 0
    """Steps skipped since the last that was taken."""


@dataclass(frozen=True)
class Guard:
    config: GuardConfig

    def judge(self, state: GuardState, loss: float, norm: float) -> tuple[str | None, GuardState]:
        """What is wrong with a step of this loss and gradient norm, None if nothing; and the state after it.

        Raises SharedError when too many steps in a row are wrong: all ranks see the same numbers.
        """
        fault = self._fault("loss", loss, state.losses, self.config.loss_factor) or self._fault(
            "gradient norm", norm, state.norms, self.config.norm_factor
        )
        if fault is None:
            recent = slice(-self.config.window, None)
            losses, norms = (*state.losses, loss)[recent], (*state.norms, norm)[recent]
            return None, GuardState(losses, norms, state.skipped)
        in_a_row = state.in_a_row + 1
        if in_a_row > self.config.max_skips:
            raise SharedError(
                f"{in_a_row} steps in a row were out of bounds, more than guard.max_skips={in_a_row - 1}: in "
                f"the last one {fault}; what was skipped is in logs/skipped.jsonl"
            )
        return fault, GuardState(state.losses, state.norms, state.skipped + 1, in_a_row)

    def _fault(self, name: str, value: float, recent: tuple[float, ...], factor: float) -> str | None:
        if not math.isfinite(value):
            return f"the {name} is {value}"
        if factor == 0 or len(recent) < self.config.window:
            return None
        median = statistics.median(recent)
        if value <= factor * median:
            return None
        return f"the {name} is {value:.4g}, {value / median:.3g} times the median of the last {len(recent)}"
