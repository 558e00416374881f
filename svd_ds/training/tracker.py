"""Weights & Biases. The only import of wandb.

Rank 0 alone speaks to it. A run folder is one W&B run for all its lives: the id is kept in logs/wandb-run-id.
Steps are ours ("train/step"), because W&B's own counts on where a killed life's last upload ended.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from svd_ds.credentials import redact, redact_tree
from svd_ds.fsync_io import replace_text, set_aside
from svd_ds.run_folder import RunFolder
from svd_ds.training.evaluate import EvalResult
from svd_ds.training.preview import Preview

MODES = ("auto", "online", "offline", "disabled")
START_S, FINISH_S = 30, 60
"""For W&B's client to start a run, and to send what is left at its end. Slurm gives a job 300 s to leave in
(slurm/stage2.sh), a checkpoint among it."""
RUN_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
CLIENT_FOLDER = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)")
"""What the client names a folder in wandb/: the time of a start, and the run's id."""


class Tracker:
    """An open W&B run. Its client is a process of its own, which may die: training goes on without it."""

    def __init__(self, run: Any, say: Callable[[str], None]) -> None:
        self.run, self.print_line, self.lost = run, say, False
        # A resumed run repeats W&B's own step: ours is the axis.
        self._tell(lambda: self.run.define_metric("train/step"))
        self._tell(lambda: self.run.define_metric("*", step_metric="train/step"))

    def where(self) -> str:
        """Where the run is shown, in words."""
        if not self.run.offline:
            return f"W&B: online, {self.run.url}"
        folder = Path(self.run.dir).parent
        return f"W&B: offline; after `wandb login`, `wandb sync {folder}` uploads it"

    def log(self, numbers: Mapping[str, float]) -> None:
        """What is known of a step, its number among it."""
        told = {f"train/{name}": value for name, value in numbers.items()}
        self._tell(lambda: self.run.log(told))

    def log_evaluation(self, step: int, measured: EvalResult) -> None:
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

    def alert(self, title: str, text: str) -> None:
        """Tell the person now, by what W&B knows of them (mail, Slack)."""
        self._tell(lambda: self.run.alert(title, text))

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
            self.print_line(
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
    where not even that, None; either is said once, and so is a damaged file of the run's id.

    mode: one of MODES; settings: what the run's config is to show; on_stop: called, in a thread of W&B's,
    when the run is stopped there, by its button or by a sweep. Raises ValueError for a WANDB_MODE that is
    none.
    """
    resolved = _resolve(mode)
    if resolved == "disabled":
        return None
    import wandb

    options: dict[str, Any] = {
        "project": project,
        "entity": entity,
        "id": _run_id(folder, say),
        "name": redact(folder.path.name),
        "dir": str(folder.path),
        "config": redact_tree(dict(settings)),
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
    return _client_mode()


def _client_mode() -> str:
    """What W&B's own client would do, by its settings and credentials: WANDB_API_KEY, WANDB_BASE_URL, NETRC
    or ~/.netrc (`wandb login`), ~/.config/wandb/settings (`wandb login --host`, `wandb offline`). Neither the
    server nor a person is asked."""
    from wandb.errors import AuthenticationError
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    settings = wandb_setup.singleton().settings
    if settings.mode in ("offline", "dryrun", "disabled"):
        return "disabled" if settings.mode == "disabled" else "offline"
    try:
        found = wbauth.authenticate_session(
            host=wbauth.HostUrl(settings.base_url, app_url=settings.app_url),
            source="svd_ds",
            prompt=False,
            update_session=False,
        )
    except (AuthenticationError, ValueError):
        # There is a key, or a server, that is none: `wandb.init` says what is wrong with it.
        return "online"
    return "online" if found is not None else "offline"


def _run_id(folder: RunFolder, say: Callable[[str], None]) -> str:
    """The id of the folder's W&B run, made at its first start; a damaged one is found in wandb/ again."""
    path = folder.logs / "wandb-run-id"
    told = ""
    if path.exists():
        found = path.read_bytes().decode("utf-8", "replace")
        if RUN_ID.fullmatch(found):
            return found
        told = f"warning: {path} is damaged: it is no id of a W&B run; it was kept as {set_aside(path)}"
    known = _newest_id(folder.path / "wandb") if told else None
    run_id = known or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    replace_text(path, run_id)
    if told:
        source = "is taken from the newest folder in wandb/" if known else "is new: another W&B run begins"
        say(f"{told}, and the id {run_id} {source}")
    return run_id


def _newest_id(wandb: Path) -> str | None:
    found = [match.groups() for path in wandb.glob("*run-*") if (match := CLIENT_FOLDER.fullmatch(path.name))]
    return max(found)[1] if found else None
