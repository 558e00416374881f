"""The guard against loss spikes: a step that lies far above the run's recent level is left out. After too
many in a row the run goes back to its last checkpoint, and on behind the clips that it has seen since.

A step out of bounds is computed again (cause.py): only one that comes out the same is left out for its clips.

It judges a step after its last backward and before the optimiser, from two numbers that are the same on all
ranks: the loss and the gradient's norm. What it remembers is part of `Progress`, so a resumed run decides the
same.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

from svd_ds.parallel.collectives import SharedError
from svd_ds.settings import Settings, number


@dataclass(frozen=True)
class GuardConfig(Settings, section="guard"):
    """A step that is not finite is always skipped."""

    loss_factor: float = number(20.0, gt=1, off=0)
    """Skip a step whose loss is above so many times the recent median; 0 never does. A network that says
    nothing has a v-space loss of about 1 at every noise level: at 20 times a good median, 0.05, all that was
    learned is lost."""
    norm_factor: float = number(50.0, gt=1, off=0)
    """The same for the gradient's norm before clipping; 0 never does. It moves far more than the loss."""
    recompute_tolerance: float = number(0.01, gt=0, lt=1, off=0)
    """A step out of bounds is computed again. Losses or gradient norms that then differ by more than this
    share are failing hardware's (svd_ds/training/fault_cause.py). It must lie far above what the order of a GPU's
    sums changes, and below what the factors let pass. 0 computes nothing again."""
    # Its numbers are written with every checkpoint.
    window: int = number(100, ge=1, le=100_000)
    """Steps of which the median is taken. As long as there are fewer, only what is not finite is skipped."""
    max_skips: int = number(5, ge=0)
    """When more steps than these are skipped in a row, the run goes back to its last checkpoint."""
    max_rollbacks: int = number(3, ge=0)
    """The run ends when it would go back more often than this."""


@dataclass(frozen=True)
class GuardState:
    """What the guard remembers of the steps before."""

    losses: tuple[float, ...] = ()
    """Of the last steps that were taken, oldest first, at most a window of them."""
    norms: tuple[float, ...] = ()
    skipped: int = 0
    """Steps skipped in all."""
    consecutive_skips: int = 0
    """Steps skipped since the last that was taken."""
    rollbacks: int = 0
    """How often the run went back."""
    hardware_faults: int = 0
    """Steps that came out otherwise when they were computed again."""

    def with_hardware_fault(self) -> GuardState:
        return replace(self, hardware_faults=self.hardware_faults + 1)

    def rolled_back(self, saved: GuardState) -> GuardState:
        """After going back to what it was when the checkpoint was saved."""
        return replace(
            saved,
            skipped=self.skipped,
            hardware_faults=self.hardware_faults,
            consecutive_skips=0,
            rollbacks=self.rollbacks + 1,
        )


@dataclass(frozen=True)
class Guard:
    config: GuardConfig

    def check(self, state: GuardState, loss: float, norm: float) -> tuple[str | None, GuardState]:
        """What is wrong with a step of this loss and gradient norm, None if nothing; the state after it."""
        fault = self._fault("loss", loss, state.losses, self.config.loss_factor) or self._fault(
            "gradient norm", norm, state.norms, self.config.norm_factor
        )
        if fault is None:
            recent = slice(-self.config.window, None)
            losses, norms = (*state.losses, loss)[recent], (*state.norms, norm)[recent]
            return None, replace(state, losses=losses, norms=norms, consecutive_skips=0)
        return fault, replace(state, skipped=state.skipped + 1, consecutive_skips=state.consecutive_skips + 1)

    def should_roll_back(self, state: GuardState) -> bool:
        """Whether too many steps in a row were skipped.

        Raises SharedError when the run has gone back too often: all ranks see the same numbers.
        """
        if state.consecutive_skips <= self.config.max_skips:
            return False
        self.check_may_roll_back(
            state,
            f"{state.consecutive_skips} steps in a row were out of bounds, more than "
            f"guard.max_skips={self.config.max_skips}",
        )
        return True

    def check_may_roll_back(self, state: GuardState, why: str) -> None:
        """Raises SharedError when the run has gone back too often, with the reason for one more time."""
        if state.rollbacks >= self.config.max_rollbacks:
            raise SharedError(
                f"{why}, and the run has gone back {state.rollbacks} of "
                f"guard.max_rollbacks={self.config.max_rollbacks} times; logs/skipped.jsonl has what was skipped"
            )

    def _fault(self, name: str, value: float, recent: tuple[float, ...], factor: float) -> str | None:
        if not math.isfinite(value):
            return f"the {name} is {value}"
        if factor == 0 or len(recent) < self.config.window:
            return None
        median = statistics.median(recent)
        if value <= factor * median:
            return None
        return f"the {name} is {value:.4g}, {value / median:.3g} times the median of the last {len(recent)}"
