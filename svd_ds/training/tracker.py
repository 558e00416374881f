"""Weights & Biases. The only import of wandb.

Rank 0 alone speaks to it. A run folder is one W&B run for all its lives: the id is kept in logs/wandb-run-id.
Steps are ours ("train/step"), because W&B's own counts on where a killed life's last upload ended.
"""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Callable, Mapping
from importlib.metadata import version
from statistics import fmean
from typing import Any
from urllib.parse import urlparse

import numpy as np

from svd_ds.training.evaluate import Measured
from svd_ds.training.folder import RunFolder
from svd_ds.training.preview import Preview

MODES = ("auto", "online", "offline", "disabled")


class Tracker:
    """An open W&B run."""

    def __init__(self, run: Any) -> None:
        self.run = run
        # A resumed run repeats W&B's own step: ours is the axis.
        self.run.define_metric("train/step")
        self.run.define_metric("*", step_metric="train/step")

    def log(self, numbers: Mapping[str, float]) -> None:
        """What is known of a step, its number among it."""
        self.run.log({f"train/{name}": value for name, value in numbers.items()})

    def log_evaluation(self, step: int, measured: Measured) -> None:
        told = {"loss": fmean(measured.loss), "loss_average": fmean(measured.loss_average)}
        for name in ("loss", "loss_average", "grad_norm"):
            told |= {f"{name}/sigma-{i}": x for i, x in enumerate(getattr(measured, name))}
        told |= {f"loss/frame-{t}": x for t, x in enumerate(measured.loss_by_frame)}
        told |= {f"grad_norm/frame-{t}": x for t, x in enumerate(measured.grad_norm_by_frame)}
        self._log_at(step, "evaluation", told)

    def log_weights(self, step: int, histograms: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """By name: counts, and the edges between them."""
        import wandb

        told = {name: wandb.Histogram(np_histogram=histogram) for name, histogram in histograms.items()}
        self._log_at(step, "weights", told)

    def log_preview(self, step: int, preview: Preview) -> None:
        """Its contact sheet, its videos and what was measured of them."""
        import wandb

        told: dict[str, Any] = {"contact_sheet": wandb.Image(str(preview.sheet)), **preview.measured}
        told |= {path.stem: wandb.Video(str(path), format="mp4") for path in preview.videos}
        self._log_at(step, "samples", told)

    def finish(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))

    def _log_at(self, step: int, room: str, told: Mapping[str, Any]) -> None:
        self.run.log({f"{room}/{name}": value for name, value in told.items()} | {"train/step": step})


def open_tracker(
    folder: RunFolder,
    mode: str,
    project: str,
    entity: str | None,
    settings: Mapping[str, Any],
    say: Callable[[str], None],
) -> Tracker | None:
    """Start or take up the folder's W&B run; None when disabled. An unreachable server means offline, said
    once.

    mode: one of MODES; settings: what the run's config is to show.
    """
    resolved = _resolve(mode)
    if resolved == "disabled":
        return None
    import wandb

    id_file = folder.logs / "wandb-run-id"
    if not id_file.exists():
        id_file.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    options: dict[str, Any] = {
        "project": project,
        "entity": entity,
        "id": id_file.read_text(),
        "name": folder.path.name,
        "dir": str(folder.path),
        "config": {**settings, "version": version("svd_ds")},
        "resume": "allow",
        "settings": wandb.Settings(console="off", silent=True, init_timeout=30),
    }
    try:
        run = wandb.init(mode=resolved, **options)
    except wandb.errors.CommError as error:
        say(
            f"warning: W&B cannot be reached ({error}); this run is logged offline in {folder.path / 'wandb'}"
        )
        run = wandb.init(mode="offline", **options)
    return Tracker(run)


def _resolve(mode: str) -> Any:
    """auto is what WANDB_MODE says, or online where a key is at hand."""
    if mode != "auto":
        return mode
    if told := os.environ.get("WANDB_MODE"):
        return told
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return "online" if netrc.netrc().authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"
