"""What a run tells: a progress bar or plain lines, files of one JSON object a line, and Weights & Biases.

metrics.jsonl         every step: StepMetrics
evaluation.jsonl      every evaluation: step, samples, Measured
logs/skipped.jsonl    every step that the guard found out of bounds: step, fault, cause (hardware, data, or
                      unknown where it was not computed again), words, taken, clips
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from svd_ds.cli import open_console, printable
from svd_ds.credentials import redact
from svd_ds.fsync_io import LineFile, append_row
from svd_ds.run_folder import RunFolder
from svd_ds.settings import Settings, choice, number, text
from svd_ds.training.evaluate import EvalResult
from svd_ds.training.fault_cause import FaultCause
from svd_ds.training.preview import Preview
from svd_ds.training.tracker import MODES, open_tracker
from svd_ds.training.usage import Goodput, MfuCounter, peak_memory_gib

RATE_WINDOW = 20
"""Steps over which clips/s is averaged."""
HISTOGRAM_SAMPLE = 2**20
"""About so many weights make a histogram."""


@dataclass(frozen=True)
class LoggerConfig(Settings, section="logger"):
    every: int = number(10, ge=1)
    """Steps between plain lines."""
    wandb: str = choice("auto", MODES)
    """auto (online when a key is set, else offline) | online | offline | disabled. WANDB_MODE overrides
    auto."""
    project: str = text("svd_ds")
    entity: str | None = text(None)


@dataclass(frozen=True)
class StepMetrics:
    """One optimiser step, the same on all ranks."""

    step: int
    samples: int
    loss: float
    lr: float
    grad_norm: float
    clips_per_s: float
    step_s: float
    overheads_s: dict[str, float]
    """By usage.WAITS: for data within `step_s`, for the others since the step before."""
    skipped: int = 0
    """Steps that the guard has skipped so far."""
    hardware_faults: int = 0
    """Steps so far that came out otherwise when they were computed again."""
    terms: dict[str, float] = field(default_factory=dict)
    """What the loss was made of."""

    def numbers(self) -> dict[str, float]:
        """Each number by name, the waits and terms among them."""
        numbers = asdict(self)
        overheads_s, terms = numbers.pop("overheads_s"), numbers.pop("terms")
        return numbers | {f"{kind}_s": seconds for kind, seconds in overheads_s.items()} | terms


class Metrics:
    """The voice of rank 0. A context: leaving it closes the bar, the files and the W&B run."""

    def __init__(
        self,
        folder: RunFolder,
        config: LoggerConfig,
        settings: Mapping[str, Any],
        total_steps: int,
        step: int,
        speed: MfuCounter | None = None,
        tags: Mapping[str, str] | None = None,
        on_stop: Callable[[], None] = lambda: None,
        check_not_fenced: Callable[[], None] = lambda: None,
    ) -> None:
        """step: where this life begins; speed: None leaves MFU out; tags: of the parameters by name, for
        histograms; on_stop: called when W&B is asked to stop the run; check_not_fenced: raises ValueError
        where another start of the run has taken the folder over, and is called before anything is written
        there by name."""
        self.config = config
        self.folder = folder
        self.check_not_fenced = check_not_fenced
        self.total_steps = total_steps
        self.console = open_console()
        self.jsonl = LineFile(folder.metrics)
        self.lines = LineFile(folder.logs / "train.log")
        self.recent: deque[StepMetrics] = deque(maxlen=RATE_WINDOW)
        self.goodput = Goodput.of(folder)
        self.speed = speed
        self.tags = tags or {}
        self.tracker = open_tracker(
            folder, config.wandb, config.project, config.entity, settings, self.print_line, on_stop
        )
        self.bar = _progress_bar(self.console) if sys.stdout.isatty() else None
        if self.bar is not None:
            self.task = self.bar.add_task("train", total=total_steps, completed=step, numbers="")
            self.bar.start()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.tracker is not None:
            self.tracker.finish(failed=kind is not None)
        self.jsonl.close()
        self.lines.close()

    def print_line(self, text: str) -> None:
        """A line for the person, above the bar and in the log file."""
        text = printable(text)
        self.console.print(text, markup=False)
        self._keep(text)

    def tracking(self) -> str:
        """Where W&B shows the run, in words."""
        return self.tracker.where() if self.tracker is not None else "W&B: disabled"

    def _keep(self, line: str) -> None:
        # A copy of what the console shows: a full disk ends a run where metrics or checkpoints are lost.
        with suppress(OSError):
            self.lines.append(redact(line))

    def log(self, metrics: StepMetrics) -> None:
        self.recent.append(metrics)
        self.jsonl.append_row(metrics.numbers())
        self.goodput.add(metrics.step_s, metrics.overheads_s)
        if self.tracker is not None:
            self.tracker.log(metrics.numbers() | self._usage(metrics))
        numbers = (
            f"loss {metrics.loss:.4f}  lr {metrics.lr:.2e}  grad {metrics.grad_norm:.3f}  "
            f"{metrics.clips_per_s:.2f} clips/s  {metrics.step_s:.2f} s/step"
        )
        if self.bar is not None:
            short = (
                f"loss {metrics.loss:.3f} lr {metrics.lr:.1e} grad {metrics.grad_norm:.2f} "
                f"{metrics.clips_per_s:.1f} clips/s {metrics.step_s:.2f} s"
            )
            self.bar.update(self.task, completed=metrics.step, numbers=short)
        if metrics.step % self.config.every == 0 or metrics.step in (1, self.total_steps):
            line = f"step {metrics.step}/{self.total_steps}  {numbers}  eta {self._remaining(metrics)}"
            self._keep(line)
            if self.bar is None:
                self.console.print(line, markup=False)

    def _usage(self, metrics: StepMetrics) -> dict[str, float]:
        usage = {f"goodput/{kind}": share for kind, share in self.goodput.shares(time.time()).items()}
        if self.speed is not None:
            usage["mfu"] = self.speed.mfu(metrics.clips_per_s)
        return usage | {"memory_gib": peak_memory_gib()}

    def wall_time(self) -> str:
        """How the run's wall time since its first start divides, in words."""
        shares = self.goodput.shares(time.time())
        told = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items() if share >= 0.005)
        return f"wall time of the run: {told}"

    def log_fault(
        self, step: int, fault: str, clips: list[str], cause: FaultCause | None = None, taken: bool = False
    ) -> None:
        """Say what was wrong with a step and why, and keep the ids of its clips.

        Args:
            cause: None where the step was not computed again.
            taken: whether the step was taken with what the second computation gave.
        """
        self.check_not_fenced()
        words = cause.message if cause is not None else ""
        kind = "unknown" if cause is None else "hardware" if cause.hardware else "data"
        row = {"step": step, "fault": fault, "cause": kind, "message": words, "taken": taken, "clips": clips}
        append_row(self.folder.skipped, row)
        told = "; ".join(filter(None, (fault, words)))
        kept = f"its clips stand in {self.folder.skipped}"
        if cause is None or not cause.hardware:
            self.print_line(f"step {step}  skipped: {told}; {kept}")
            return
        end = "the step is taken as it was computed the second time" if taken else f"skipped; {kept}"
        self.print_line(f"step {step}  warning: failing hardware: {told}; {end}")
        if self.tracker is not None:
            self.tracker.alert("failing hardware", f"step {step}: {told}")

    def log_rollback(self, step: int, left: int) -> None:
        """The run goes on from `step`: what was told of the steps behind it, up to `left`, is dropped."""
        self.check_not_fenced()
        self.jsonl.close()
        damage = self.folder.truncate_after(step, self.folder.metrics, self.folder.evaluation)
        self.jsonl = LineFile(self.folder.metrics)
        self.goodput = Goodput.of(self.folder)
        for sentence in damage:
            self.print_line(f"warning: {sentence}")
        self.print_line(f"step {left}  going back to the checkpoint of step {step}, and on with new clips")

    def log_evaluation(self, step: int, samples: int, measured: EvalResult) -> None:
        self.check_not_fenced()
        append_row(self.folder.evaluation, {"step": step, "samples": samples, **asdict(measured)})
        mean, average = fmean(measured.loss), fmean(measured.loss_average)
        self.print_line(f"step {step}  fixed set: loss {mean:.4f}, of the averaged weights {average:.4f}")
        if self.tracker is not None:
            self.tracker.log_evaluation(step, measured)

    def log_weights(self, step: int, shards: Mapping[str, Tensor]) -> None:
        """Send W&B histograms by tag, of a sample of this rank's flat shards; parameter name -> shard."""
        if self.tracker is None:
            return
        by_tag: dict[str, list[Tensor]] = {}
        for name, shard in shards.items():
            by_tag.setdefault(self.tags.get(name, "adapter"), []).append(shard.detach())
        histograms = {}
        for tag, parts in by_tag.items():
            every = max(sum(part.numel() for part in parts) // HISTOGRAM_SAMPLE, 1)
            histograms[tag] = np.histogram(
                torch.cat([part[::every] for part in parts]).float().cpu(), bins=64
            )
        self.tracker.log_weights(step, histograms)

    def log_preview(self, step: int, preview: Preview) -> None:
        """Say where its videos (mp4) and contact sheet (png) are and what was measured; send all to W&B."""
        measured = "".join(f", {name} {value:.2f}" for name, value in preview.measured.items())
        self.print_line(f"step {step}  made {len(preview.videos)} videos{measured}: {preview.sheet}")
        if self.tracker is not None:
            self.tracker.log_preview(step, preview)

    def _remaining(self, metrics: StepMetrics) -> str:
        mean_s = sum(entry.step_s for entry in self.recent) / len(self.recent)
        seconds = round((self.total_steps - metrics.step) * mean_s)
        hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _progress_bar(console: Console) -> Progress:
    """Fits 80 columns: step, bar, numbers, time left."""
    return Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=8),
        TextColumn("{task.fields[numbers]}"),
        TextColumn("eta"),
        TimeRemainingColumn(compact=True),
        console=console,
    )
