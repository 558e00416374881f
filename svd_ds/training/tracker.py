"""Weights & Biases (W&B). No other module imports wandb.

Only rank 0 uses it. A run folder is one W&B run over all restarts: its id is in logs/wandb-run-id. The step
axis of W&B's charts is our metric "train/step": W&B's own step would continue from the last upload before a
kill, not from the checkpoint.
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
from svd_ds.fsync_io import keep_damaged_copy, replace_text
from svd_ds.run_folder import RunFolder
from svd_ds.training.evaluate import EvalResult
from svd_ds.training.preview import Preview

MODES = ("auto", "online", "offline", "disabled")
INIT_TIMEOUT_S, FINISH_TIMEOUT_S = 30, 60
"""Seconds that the W&B client may take to start a run, and to send the remaining data at its end. Slurm gives
a job 300 s to stop (slurm/stage2.sh), including a checkpoint."""
RUN_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
CLIENT_FOLDER = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)")
"""Name of a folder of the client in wandb/: time of a start, and id of the run."""


class Tracker:
    """An open W&B run. W&B's client is a separate process; if it dies, training continues without it."""

    def __init__(self, run: Any, print_line: Callable[[str], None]) -> None:
        """
        Args:
            run: run that `wandb.init` returned.
            print_line: prints a warning for the user.
        """
        self.run, self.print_line, self.lost = run, print_line, False
        # See the docstring of the module.
        self._send(lambda: self.run.define_metric("train/step"))
        self._send(lambda: self.run.define_metric("*", step_metric="train/step"))

    def status(self) -> str:
        """Return one line: the URL of the run, or the command that uploads an offline run."""
        if not self.run.offline:
            return f"W&B: online, {self.run.url}"
        folder = Path(self.run.dir).parent
        return f"W&B: offline; after `wandb login`, `wandb sync {folder}` uploads it"

    def log(self, numbers: Mapping[str, float]) -> None:
        """Log the numbers of a step by name; they include "step"."""
        row = {f"train/{name}": value for name, value in numbers.items()}
        self._send(lambda: self.run.log(row))

    def log_evaluation(self, step: int, result: EvalResult) -> None:
        """Log an evaluation: the means, and each list under names with the index of the bin or frame."""
        row = {"loss": fmean(result.loss), "loss_average": fmean(result.loss_average)}
        for name in ("loss", "loss_average", "grad_norm"):
            row |= {f"{name}/sigma-{i}": x for i, x in enumerate(getattr(result, name))}
        row |= {f"loss/frame-{t}": x for t, x in enumerate(result.loss_by_frame)}
        row |= {f"grad_norm/frame-{t}": x for t, x in enumerate(result.grad_norm_by_frame)}
        self._log_at(step, "evaluation", row)

    def log_weights(self, step: int, histograms: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Log histograms of weights.

        Args:
            histograms: name -> counts and bin edges, as numpy.histogram returns them.
        """
        import wandb

        row = {name: wandb.Histogram(np_histogram=histogram) for name, histogram in histograms.items()}
        self._log_at(step, "weights", row)

    def log_preview(self, step: int, preview: Preview) -> None:
        """Log the contact sheet, the videos and the metrics of a preview."""
        import wandb

        row: dict[str, Any] = {"contact_sheet": wandb.Image(str(preview.sheet)), **preview.metrics}
        row |= {path.stem: wandb.Video(str(path), format="mp4") for path in preview.videos}
        self._log_at(step, "samples", row)

    def alert(self, title: str, text: str) -> None:
        """Send an alert to the user, by mail or Slack as configured in W&B."""
        self._send(lambda: self.run.alert(title, text))

    def finish(self, failed: bool) -> None:
        """Send the remaining data, for at most FINISH_TIMEOUT_S seconds, and close the run."""
        self._send(lambda: self.run.finish(exit_code=int(failed)))
        if self.lost:
            # Otherwise the client tries again when the interpreter exits, and prints a traceback.
            _shut_down_client()

    def _log_at(self, step: int, section: str, values: Mapping[str, Any]) -> None:
        row = {f"{section}/{name}": value for name, value in values.items()} | {"train/step": step}
        self._send(lambda: self.run.log(row))

    def _send(self, call: Callable[[], object]) -> None:
        """Call the client; after the first call that fails, call it no more."""
        if self.lost:
            return
        try:
            call()
        except Exception as error:  # wandb's errors have no common base class, and none may end a run
            self.lost = True
            self.print_line(
                f"warning: W&B is lost ({_one_line(error)}); this run continues without it, and the data "
                "that was not sent is in its folder wandb/, for `wandb sync`"
            )


def open_tracker(
    folder: RunFolder,
    mode: str,
    project: str,
    entity: str | None,
    settings: Mapping[str, Any],
    print_line: Callable[[str], None],
    on_stop: Callable[[], None],
) -> Tracker | None:
    """Start or resume the W&B run of a run folder.

    If it cannot be online, it is offline. A warning is printed for each failed mode and for a damaged run id.

    Args:
        mode: one of MODES.
        settings: resolved config of the run.
        print_line: prints a warning for the user.
        on_stop: called in a thread of W&B's client when the run is stopped in W&B, by its button or by a
            sweep.

    Returns:
        The tracker; None if W&B is disabled or cannot be used at all.

    Raises:
        ValueError: WANDB_MODE is not a mode.
    """
    resolved = _resolve_mode(mode)
    if resolved == "disabled":
        return None
    import wandb

    options: dict[str, Any] = {
        "project": project,
        "entity": entity,
        "id": _run_id(folder, print_line),
        "name": redact(folder.path.name),
        "dir": str(folder.path),
        "config": redact_tree(dict(settings)),
        "resume": "allow",
        "settings": wandb.Settings(
            console="off",
            silent=True,
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
            # By default W&B interrupts the process at once, without a checkpoint.
            stop_fn=on_stop,
        ),
    }
    for attempted in dict.fromkeys((resolved, "offline")):
        try:
            return Tracker(wandb.init(mode=attempted, **options), print_line)
        except Exception as error:  # as in Tracker
            instead = "logged offline in its folder wandb/" if attempted == "online" else "not logged to W&B"
            print_line(f"warning: W&B cannot be used {attempted} ({_one_line(error)}); this run is {instead}")
            # The client considers the run id as in use until it is shut down.
            _shut_down_client()
    return None


def _shut_down_client() -> None:
    import wandb

    # Its failure has already been reported.
    with suppress(Exception):
        wandb.teardown()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _resolve_mode(mode: str) -> Any:
    """Resolve auto to WANDB_MODE, else to online if the client has an API key, else to offline."""
    env_mode = os.environ.get("WANDB_MODE")
    if env_mode and env_mode not in MODES[1:]:
        # Checked for every mode, because the client reads the variable too.
        raise ValueError(f"WANDB_MODE is {env_mode!r}: it must be one of {', '.join(MODES[1:])}")
    if mode != "auto":
        return mode
    if env_mode:
        return env_mode
    return _client_mode()


def _client_mode() -> str:
    """Return the mode that W&B's client would use, by its settings and credentials.

    They are WANDB_API_KEY, WANDB_BASE_URL, NETRC or ~/.netrc (`wandb login`), and ~/.config/wandb/settings
    (`wandb login --host`, `wandb offline`). Nothing is sent to the server, and there is no prompt.
    """
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
        # The key or the server address is malformed: `wandb.init` reports what is wrong with it.
        return "online"
    return "online" if found is not None else "offline"


def _run_id(folder: RunFolder, print_line: Callable[[str], None]) -> str:
    """Return the id of the folder's W&B run, created at its first start.

    If the file of the id is damaged, the id is recovered from the newest folder in wandb/.
    """
    path = folder.logs / "wandb-run-id"
    damage = ""
    if path.exists():
        found = path.read_bytes().decode("utf-8", "replace")
        if RUN_ID.fullmatch(found):
            return found
        copy = keep_damaged_copy(path)
        damage = f"warning: {path} is damaged: it is not the id of a W&B run; it was kept as {copy}"
    known = _newest_id(folder.path / "wandb") if damage else None
    run_id = known or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    replace_text(path, run_id)
    if damage:
        source = "is taken from the newest folder in wandb/" if known else "is new: another W&B run begins"
        print_line(f"{damage}, and the id {run_id} {source}")
    return run_id


def _newest_id(wandb: Path) -> str | None:
    found = [match.groups() for path in wandb.glob("*run-*") if (match := CLIENT_FOLDER.fullmatch(path.name))]
    return max(found)[1] if found else None
