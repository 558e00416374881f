"""Weights & Biases. The only import of wandb.

Rank 0 alone speaks to it. A run folder is one W&B run for all its lives: the id is kept in logs/wandb-run-id.
Steps are ours ("train/step"), because W&B's own counts on where a killed life's last upload ended.
"""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from statistics import fmean
from typing import Any
from urllib.parse import urlparse

import numpy as np

from svd_ds.training.evaluate import Measured
from svd_ds.training.folder import RunFolder
from svd_ds.training.preview import Preview

MODES = ("auto", "online", "offline", "disabled")
START_S, FINISH_S = 30, 60
"""For W&B's client to start a run, and to send what is left at its end. Slurm gives a job 300 s to leave in
(slurm/stage2.sh), a checkpoint among it."""


class Tracker:
    """An open W&B run. Its client is a process of its own, which may die: training goes on without it."""

    def __init__(self, run: Any, say: Callable[[str], None]) -> None:
        self.run, self.say, self.lost = run, say, False
        # A resumed run repeats W&B's own step: ours is the axis.
        self._tell(lambda: self.run.define_metric("train/step"))
        self._tell(lambda: self.run.define_metric("*", step_metric="train/step"))

    def log(self, numbers: Mapping[str, float]) -> None:
        """What is known of a step, its number among it."""
        told = {f"train/{name}": value for name, value in numbers.items()}
        self._tell(lambda: self.run.log(told))

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
        """Send what is left, for at most FINISH_S."""
        self._tell(lambda: self.run.finish(exit_code=int(failed)))
        if self.lost:
            # Or it tries once more as the interpreter ends, and puts a traceback on the console.
            _end_client()

    def _log_at(self, step: int, room: str, told: Mapping[str, Any]) -> None:
        row = {f"{room}/{name}": value for name, value in told.items()} | {"train/step": step}
        self._tell(lambda: self.run.log(row))

    def _tell(self, message: Callable[[], object]) -> None:
        """Give the client a message; from the first that fails on, none."""
        if self.lost:
            return
        try:
            message()
        except Exception as error:  # its kinds have no common base, and none is worth a run
            self.lost = True
            self.say(
                f"warning: W&B is lost ({_words(error)}); this run goes on without it, and what was not sent "
                "is in its folder wandb/, for `wandb sync`"
            )


def open_tracker(
    folder: RunFolder,
    mode: str,
    project: str,
    entity: str | None,
    settings: Mapping[str, Any],
    say: Callable[[str], None],
    on_stop: Callable[[], None],
) -> Tracker | None:
    """Start or take up the folder's W&B run; None when disabled. Where it cannot be online it is offline, and
    where not even that, None; either is said once.

    mode: one of MODES; settings: what the run's config is to show; on_stop: called, in a thread of W&B's,
    when the run is stopped there, by its button or by a sweep. Raises ValueError for a WANDB_MODE that is
    none.
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
        "config": dict(settings),
        "resume": "allow",
        "settings": wandb.Settings(
            console="off",
            silent=True,
            init_timeout=START_S,
            finish_timeout=FINISH_S,
            finish_timeout_raises=True,
            # Its own way is an interrupt at once, which leaves no checkpoint.
            stop_fn=on_stop,
        ),
    }
    for way in dict.fromkeys((resolved, "offline")):
        try:
            return Tracker(wandb.init(mode=way, **options), say)
        except Exception as error:  # as in Tracker
            instead = "logged offline in its folder wandb/" if way == "online" else "not logged there"
            say(f"warning: W&B cannot be used {way} ({_words(error)}); this run is {instead}")
            # It holds the run's id for used.
            _end_client()
    return None


def _end_client() -> None:
    import wandb

    # What it has failed at is told.
    with suppress(Exception):
        wandb.teardown()


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _resolve(mode: str) -> Any:
    """auto is what WANDB_MODE says, or online where a key is at hand."""
    told = os.environ.get("WANDB_MODE")
    if told and told not in MODES[1:]:
        # Whatever the mode: the client reads it too.
        raise ValueError(f"WANDB_MODE is {told!r}: choose {', '.join(MODES[1:])}")
    if mode != "auto":
        return mode
    if told:
        return told
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return "online" if netrc.netrc().authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"
