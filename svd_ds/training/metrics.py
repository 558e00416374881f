"""Rank-0 logger: console, JSONL files and Weights & Biases.

metrics.jsonl         StepMetrics of every step
evaluation.jsonl      step, samples and EvalResult of every evaluation
logs/skipped.jsonl    every step that the guard found out of bounds: step, fault, cause (hardware, data, or
                      unknown if it was not computed again), message, taken, clips
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
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
from svd_ds.training.null_metrics import NullMetrics, StepMetrics
from svd_ds.training.preview import Preview
from svd_ds.training.tracker import MODES, open_tracker
from svd_ds.training.usage import Goodput, MfuCounter, peak_memory_gib

RATE_WINDOW = 20
"""Number of steps over which clips/s is averaged."""
HISTOGRAM_SAMPLE = 2**20
"""Approximate number of weights in a histogram."""


@dataclass(frozen=True)
class LoggerConfig(Settings, section="logger"):
    """Lines on the console, and the W&B run."""

    every: int = number(10, ge=1)
    """Steps between lines on the console."""
    wandb: str = choice("auto", MODES)
    """W&B mode: auto (online if wandb has an API key, else offline) | online | offline | disabled. WANDB_MODE
    overrides auto."""
    project: str = text("svd_ds")
    """W&B project."""
    entity: str | None = text(None)
    """W&B entity; null is the account's default."""


class Metrics(NullMetrics):
    """Rank-0 logger. As a context manager it closes the progress bar, the files and the W&B run."""

    def __init__(
        self,
        folder: RunFolder,
        config: LoggerConfig,
        settings: Mapping[str, Any],
        total_steps: int,
        step: int,
        mfu_counter: MfuCounter | None = None,
        tags: Mapping[str, str] | None = None,
        on_stop: Callable[[], None] = lambda: None,
        check_not_fenced: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            settings: resolved config, for W&B.
            step: step from which this process resumes.
            mfu_counter: None leaves MFU out.
            tags: parameter name -> tag, for histograms.
            on_stop: called when the run is stopped in W&B.
            check_not_fenced: raises ValueError if another restart has acquired the run folder; called before
                a file in it is opened or replaced.
        """
        self.config = config
        self.folder = folder
        self.check_not_fenced = check_not_fenced
        self.total_steps = total_steps
        self.console = open_console()
        self.jsonl = LineFile(folder.metrics)
        self.lines = LineFile(folder.logs / "train.log")
        self.recent: deque[StepMetrics] = deque(maxlen=RATE_WINDOW)
        self.goodput = Goodput.from_run_folder(folder)
        self.mfu_counter = mfu_counter
        self.tags = tags or {}
        self.tracker = open_tracker(
            folder, config.wandb, config.project, config.entity, settings, self.print_line, on_stop
        )
        self.bar = _progress_bar(self.console) if sys.stdout.isatty() else None
        if self.bar is not None:
            self.task = self.bar.add_task("train", total=total_steps, completed=step, numbers="")
            self.bar.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.tracker is not None:
            self.tracker.finish(failed=kind is not None)
        self.jsonl.close()
        self.lines.close()

    def print_line(self, text: str) -> None:
        text = printable(text)
        self.console.print(text, markup=False)
        self._append_to_log(text)

    def wandb_status(self) -> str:
        return self.tracker.status() if self.tracker is not None else "W&B: disabled"

    def _append_to_log(self, line: str) -> None:
        # A copy of the console: a full disk ends a run only if metrics or checkpoints would be lost.
        with suppress(OSError):
            self.lines.append(redact(line))

    def log(self, metrics: StepMetrics) -> None:
        """Log a step to metrics.jsonl, W&B, the progress bar and, every `logger.every` steps, the console."""
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
            self._append_to_log(line)
            if self.bar is None:
                self.console.print(line, markup=False)

    def _usage(self, metrics: StepMetrics) -> dict[str, float]:
        usage = {f"goodput/{kind}": share for kind, share in self.goodput.shares(time.time()).items()}
        if self.mfu_counter is not None:
            usage["mfu"] = self.mfu_counter.mfu(metrics.clips_per_s)
        return usage | {"memory_gib": peak_memory_gib()}

    def print_wall_time(self) -> None:
        shares = self.goodput.shares(time.time())
        parts = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items() if share >= 0.005)
        self.print_line(f"  wall time of the run: {parts}")

    def log_fault(
        self, step: int, fault: str, clips: list[str], cause: FaultCause | None = None, taken: bool = False
    ) -> None:
        """Log a step that was out of bounds, with its clips, to skipped.jsonl and the console.

        Args:
            cause: result of the second computation; None if the step was computed once.
            taken: True if the step is taken with the result of the second computation.
        """
        self.check_not_fenced()
        message = cause.message if cause is not None else ""
        kind = "unknown" if cause is None else "hardware" if cause.hardware else "data"
        row = {
            "step": step,
            "fault": fault,
            "cause": kind,
            "message": message,
            "taken": taken,
            "clips": clips,
        }
        append_row(self.folder.skipped, row)
        report = "; ".join(filter(None, (fault, message)))
        kept = f"its clips are listed in {self.folder.skipped}"
        if cause is None or not cause.hardware:
            self.print_line(f"step {step}  skipped: {report}; {kept}")
            return
        end = "the step is taken with the result of the second computation" if taken else f"skipped; {kept}"
        self.print_line(f"step {step}  warning: failing hardware: {report}; {end}")
        if self.tracker is not None:
            self.tracker.alert("failing hardware", f"step {step}: {report}")

    def log_rollback(self, step: int, from_step: int) -> None:
        """Drop the rows after `step`: the run rolls back to its checkpoint from `from_step`."""
        self.check_not_fenced()
        self.jsonl.close()
        damage = self.folder.truncate_after(step, self.folder.metrics, self.folder.evaluation)
        self.jsonl = LineFile(self.folder.metrics)
        self.goodput = Goodput.from_run_folder(self.folder)
        for sentence in damage:
            self.print_line(f"warning: {sentence}")
        self.print_line(
            f"step {from_step}  rolled back to the checkpoint of step {step}; the data continues with new "
            "clips"
        )

    def log_evaluation(self, step: int, samples: int, result: EvalResult) -> None:
        """Log losses on the fixed set to evaluation.jsonl, the console and W&B."""
        self.check_not_fenced()
        append_row(self.folder.evaluation, {"step": step, "samples": samples, **asdict(result)})
        mean, average = fmean(result.loss), fmean(result.loss_average)
        self.print_line(f"step {step}  fixed set: loss {mean:.4f}, with averaged weights {average:.4f}")
        if self.tracker is not None:
            self.tracker.log_evaluation(step, result)

    def log_weights(self, step: int, shards: Mapping[str, Tensor]) -> None:
        """Log histograms of this rank's shards to W&B, one per tag."""
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
        metrics = "".join(f", {name} {value:.2f}" for name, value in preview.metrics.items())
        self.print_line(f"step {step}  made {len(preview.videos)} videos{metrics}: {preview.sheet}")
        if self.tracker is not None:
            self.tracker.log_preview(step, preview)

    def _remaining(self, metrics: StepMetrics) -> str:
        mean_s = sum(entry.step_s for entry in self.recent) / len(self.recent)
        seconds = round((self.total_steps - metrics.step) * mean_s)
        hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _progress_bar(console: Console) -> Progress:
    """Progress bar of 80 columns: step, bar, numbers, time left."""
    return Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=8),
        TextColumn("{task.fields[numbers]}"),
        TextColumn("eta"),
        TimeRemainingColumn(compact=True),
        console=console,
    )
