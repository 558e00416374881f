"""Guard against loss spikes: it skips steps whose loss or gradient norm is far above the recent median.

After too many skipped steps in a row the run rolls back to its newest proven checkpoint and continues with
new clips. A step that is out of bounds is computed again (fault_cause.py); if the second computation differs
and is within the bounds, the step is taken with its gradients.

A step is checked after its last backward pass and before the optimiser step, by two numbers that are the same
on all ranks. The guard's state is part of `Progress`, so a resumed run makes the same decisions.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

from svd_ds.parallel.collectives import SharedError
from svd_ds.settings import Settings, number


@dataclass(frozen=True)
class GuardConfig(Settings, section="guard"):
    """Bounds of the guard. A step whose loss or gradient norm is not finite is always skipped."""

    loss_factor: float = number(20.0, gt=1, off=0)
    """Multiple of the recent median loss above which a step is skipped; 0 sets no bound. A network that
    outputs zero has a v-space loss of about 1 at every noise level: 20 times a good median, 0.05, means that
    everything learned is lost."""
    norm_factor: float = number(50.0, gt=1, off=0)
    """Multiple of the recent median gradient norm, before clipping, above which a step is skipped; 0 sets no
    bound. The norm varies far more than the loss."""
    recompute_tolerance: float = number(0.01, gt=0, lt=1, off=0)
    """Relative difference above which two computations of one step mean failing hardware. A step out of
    bounds is computed again for this comparison; with 0 no step is computed again. Choose it far above the
    differences that a varying order of additions on a GPU causes."""
    # The state of the guard is written with every checkpoint, so the window is bounded.
    window: int = number(100, ge=1, le=100_000)
    """Number of taken steps over which the median is computed. Until that many steps were taken, only steps
    that are not finite are skipped."""
    max_skips: int = number(5, ge=0)
    """Largest number of consecutive skipped steps; one more rolls the run back to its last checkpoint."""
    max_rollbacks: int = number(3, ge=0)
    """Largest number of rollbacks of a run; instead of one more the run ends with an error."""


@dataclass(frozen=True)
class GuardState:
    """State of the guard: recent losses and gradient norms, and counts over the run."""

    losses: tuple[float, ...] = ()
    """Losses of the last taken steps, oldest first, at most guard.window of them."""
    norms: tuple[float, ...] = ()
    """Gradient norms of the same steps."""
    skipped: int = 0
    """Number of skipped steps of the run."""
    consecutive_skips: int = 0
    """Number of skipped steps since the last taken one."""
    rollbacks: int = 0
    """Number of rollbacks of the run."""
    hardware_faults: int = 0
    """Number of steps whose second computation differed from the first."""

    def with_hardware_fault(self) -> GuardState:
        """Return the state with one more hardware fault."""
        return replace(self, hardware_faults=self.hardware_faults + 1)

    def rolled_back(self, saved: GuardState) -> GuardState:
        """Return the state after a rollback, with the counts of the whole run.

        Args:
            saved: state in the checkpoint; its recent losses and gradient norms are used.
        """
        return replace(
            saved,
            skipped=self.skipped,
            hardware_faults=self.hardware_faults,
            consecutive_skips=0,
            rollbacks=self.rollbacks + 1,
        )


@dataclass(frozen=True)
class Guard:
    """Decides which steps are taken; it has no state of its own."""

    config: GuardConfig

    def check(self, state: GuardState, loss: float, norm: float) -> tuple[str | None, GuardState]:
        """Check the loss and the gradient norm of a step.

        Returns:
            The reason why the step is out of bounds, None if it is not; and the state after the step.
        """
        fault = self._fault("loss", loss, state.losses, self.config.loss_factor) or self._fault(
            "gradient norm", norm, state.norms, self.config.norm_factor
        )
        if fault is None:
            recent = slice(-self.config.window, None)
            losses, norms = (*state.losses, loss)[recent], (*state.norms, norm)[recent]
            return None, replace(state, losses=losses, norms=norms, consecutive_skips=0)
        return fault, replace(state, skipped=state.skipped + 1, consecutive_skips=state.consecutive_skips + 1)

    def should_roll_back(self, state: GuardState) -> bool:
        """Return True if more than guard.max_skips steps in a row were skipped.

        Raises:
            SharedError: the run has already rolled back guard.max_rollbacks times; on all ranks, which see
                the same numbers.
        """
        if state.consecutive_skips <= self.config.max_skips:
            return False
        self.check_may_roll_back(
            state,
            f"{state.consecutive_skips} steps in a row were out of bounds, more than "
            f"guard.max_skips={self.config.max_skips}",
        )
        return True

    def check_may_roll_back(self, state: GuardState, reason: str) -> None:
        """Check that one more rollback is allowed.

        Args:
            reason: reason for the rollback, for the error.

        Raises:
            SharedError: the run has already rolled back guard.max_rollbacks times.
        """
        if state.rollbacks >= self.config.max_rollbacks:
            raise SharedError(
                f"{reason}, and the run has rolled back {state.rollbacks} of "
                f"guard.max_rollbacks={self.config.max_rollbacks} times; "
                "logs/skipped.jsonl lists the skipped steps"
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
