"""What a run tells: a progress bar or plain lines, files of one JSON object a line, and Weights & Biases.
The only import of wandb.

    metrics.jsonl         every step: StepMetrics
    evaluation.jsonl      every evaluation: step, samples, Measured
    logs/skipped.jsonl    every step that the guard skipped: step, fault, clips
"""

from __future__ import annotations

import json
import netrc
import os
import secrets
import sys
from collections import deque
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any
from urllib.parse import urlparse

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from svd_ds.training.evaluate import Measured
from svd_ds.training.folder import RunFolder
from svd_ds.training.preview import Preview

RATE_WINDOW = 20
"""Steps over which clips/s is averaged."""


@dataclass(frozen=True)
class LoggerConfig:
    every: int = 10
    """Steps between plain lines."""
    wandb: str = "auto"
    """auto (online when a key is set, else offline) | online | offline | disabled. WANDB_MODE overrides
    auto."""
    project: str = "svd_ds"
    entity: str | None = None

    def __post_init__(self) -> None:
        if self.wandb not in ("auto", "online", "offline", "disabled"):
            raise ValueError(f"logger.wandb is {self.wandb!r}: choose auto, online, offline or disabled")
        if self.every < 1:
            raise ValueError(f"logger.every is {self.every}: it must be at least 1")


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
    data_s: float
    """Part of `step_s` spent waiting for clips."""
    skipped: int = 0
    """Steps that the guard has skipped so far."""
    terms: dict[str, float] = field(default_factory=dict)
    """What the loss was made of."""

    def numbers(self) -> dict[str, float]:
        """Each number by name, the terms among them."""
        numbers = asdict(self)
        terms = numbers.pop("terms")
        return numbers | terms


class Metrics:
    """The voice of rank 0. A context: leaving it closes the bar, the files and the W&B run."""

    def __init__(
        self, folder: RunFolder, config: LoggerConfig, settings: dict[str, Any], total_steps: int, step: int
    ) -> None:
        self.config = config
        self.folder = folder
        self.total_steps = total_steps
        self.console = Console(soft_wrap=True, highlight=False)
        self.jsonl = folder.metrics.open("a", buffering=1)
        self.lines = (folder.logs / "train.log").open("a", buffering=1)
        self.recent: deque[StepMetrics] = deque(maxlen=RATE_WINDOW)
        self.wandb = _start_wandb(folder, config, settings, self.say)
        self.bar = _progress_bar(self.console) if sys.stdout.isatty() else None
        if self.bar is not None:
            self.task = self.bar.add_task("train", total=total_steps, completed=step, numbers="")
            self.bar.start()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.wandb is not None:
            self.wandb.finish(exit_code=0 if kind is None else 1)
        self.jsonl.close()
        self.lines.close()

    def say(self, text: str) -> None:
        """A line for the person, above the bar and in the log file."""
        self.console.print(text, markup=False)
        self.lines.write(text + "\n")

    def log(self, metrics: StepMetrics) -> None:
        self.recent.append(metrics)
        self.jsonl.write(json.dumps(metrics.numbers()) + "\n")
        if self.wandb is not None:
            self.wandb.log({f"train/{key}": value for key, value in metrics.numbers().items()})
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
            self.lines.write(line + "\n")
            if self.bar is None:
                self.console.print(line, markup=False)

    def log_skipped(self, step: int, fault: str, clips: list[str]) -> None:
        """Say which step was left out and why, and keep the ids of its clips."""
        with self.folder.skipped.open("a") as file:
            file.write(json.dumps({"step": step, "fault": fault, "clips": clips}) + "\n")
        self.say(f"step {step}  skipped: {fault}; its clips stand in {self.folder.skipped}")

    def log_evaluation(self, step: int, samples: int, measured: Measured) -> None:
        with self.folder.evaluation.open("a") as file:
            file.write(json.dumps({"step": step, "samples": samples, **asdict(measured)}) + "\n")
        mean, average = fmean(measured.loss), fmean(measured.loss_average)
        self.say(f"step {step}  fixed set: loss {mean:.4f}, of the averaged weights {average:.4f}")
        if self.wandb is not None:
            scalars = {"loss": mean, "loss_average": average}
            for name in ("loss", "loss_average", "grad_norm"):
                scalars |= {f"{name}/sigma-{i}": x for i, x in enumerate(getattr(measured, name))}
            scalars |= {f"loss/frame-{i}": x for i, x in enumerate(measured.loss_by_frame)}
            self.wandb.log(
                {f"evaluation/{key}": value for key, value in scalars.items()} | {"train/step": step}
            )

    def log_preview(self, step: int, preview: Preview) -> None:
        """Say where its videos (mp4) and contact sheet (png) are and what was measured; send all to W&B."""
        measured = "".join(f", {name} {value:.2f}" for name, value in preview.measured.items())
        self.say(f"step {step}  made {len(preview.videos)} videos{measured}: {preview.sheet}")
        if self.wandb is not None:
            import wandb

            told: dict[str, Any] = {"contact_sheet": wandb.Image(str(preview.sheet)), **preview.measured}
            told |= {path.stem: wandb.Video(str(path), format="mp4") for path in preview.videos}
            self.wandb.log({f"samples/{name}": it for name, it in told.items()} | {"train/step": step})

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


def _wandb_mode(config: LoggerConfig) -> Any:
    if config.wandb != "auto":
        return config.wandb
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return "online" if netrc.netrc().authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def _start_wandb(folder: RunFolder, config: LoggerConfig, settings: dict[str, Any], say: Any) -> Any:
    """Start or take up the folder's W&B run; None when disabled. An unreachable server means offline, said
    once."""
    mode = _wandb_mode(config)
    if mode == "disabled":
        return None
    import wandb

    id_file = folder.logs / "wandb-run-id"
    if not id_file.exists():
        id_file.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    options: dict[str, Any] = {
        "project": config.project,
        "entity": config.entity,
        "id": id_file.read_text(),
        "name": folder.path.name,
        "dir": str(folder.path),
        "config": settings,
        "resume": "allow",
    }
    quiet = wandb.Settings(console="off", silent=True, init_timeout=30)
    try:
        run = wandb.init(mode=mode, settings=quiet, **options)
    except wandb.errors.CommError as error:
        say(
            f"warning: W&B cannot be reached ({error}); this run is logged offline in {folder.path / 'wandb'}"
        )
        run = wandb.init(mode="offline", settings=quiet, **options)
    # A resumed run repeats W&B's own step: ours is the axis.
    run.define_metric("train/step")
    run.define_metric("*", step_metric="train/step")
    return run
