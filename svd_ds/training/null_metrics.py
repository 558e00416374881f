"""Interface of the metrics, and its implementation for the ranks above 0, which logs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Self

from torch import Tensor

from svd_ds.training.evaluate import EvalResult
from svd_ds.training.fault_cause import FaultCause
from svd_ds.training.preview import Preview


@dataclass(frozen=True)
class StepMetrics:
    """Numbers of one optimiser step, the same on all ranks."""

    step: int
    samples: int
    loss: float
    lr: float
    grad_norm: float
    clips_per_s: float
    step_s: float
    overheads_s: dict[str, float]
    """Seconds of each of usage.OVERHEADS. `step_s` includes the data's; the others were spent since the last
    step."""
    skipped: int = 0
    """Number of steps that the guard has skipped so far."""
    hardware_faults: int = 0
    """Number of steps so far whose second computation differed from the first."""
    terms: dict[str, float] = field(default_factory=dict)
    """Terms of the loss, by name."""

    def numbers(self) -> dict[str, float]:
        """Return all numbers by name, overheads and loss terms included."""
        numbers = asdict(self)
        overheads_s, terms = numbers.pop("overheads_s"), numbers.pop("terms")
        return numbers | {f"{kind}_s": seconds for kind, seconds in overheads_s.items()} | terms


class NullMetrics:
    """Metrics of the ranks above 0: the same interface, and nothing is logged."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        return

    def print_line(self, text: str) -> None:
        """Print a line for the user, above the progress bar, and append it to the log file."""

    def wandb_status(self) -> str:
        """Return one line: the W&B address of the run, or the mode."""
        return ""

    def print_wall_time(self) -> None:
        """Print the shares of compute, overheads and restarts in the run's wall time since its first
        start."""

    def log(self, metrics: StepMetrics) -> None:
        """Log one step."""

    def log_fault(
        self, step: int, fault: str, clips: list[str], cause: FaultCause | None = None, taken: bool = False
    ) -> None:
        """Log a step that was out of bounds, its cause, and the ids of its clips.

        Args:
            cause: None if the step was not computed again.
            taken: True if the step was taken with the result of the second computation.
        """

    def log_rollback(self, step: int, from_step: int) -> None:
        """Drop the metrics of the steps after `step`, up to `from_step`: the run resumes from `step`."""

    def log_evaluation(self, step: int, samples: int, result: EvalResult) -> None:
        """Log an evaluation on the fixed set."""

    def log_weights(self, step: int, shards: Mapping[str, Tensor]) -> None:
        """Send W&B histograms of a sample of this rank's flat weight shards, by parameter tag.

        Args:
            shards: parameter name -> flat shard of this rank.
        """

    def log_preview(self, step: int, preview: Preview) -> None:
        """Log the paths of the preview videos (mp4) and contact sheet (png); send them to W&B."""
