"""Ownership of a run folder, commits and pruning of its checkpoints. Rank 0 does all of this.

Each restart that acquires a run folder gets a *fencing token*, a random number that it adds to
logs/restarts.jsonl. The restart with the newest token owns the folder, and only the owner writes. A process
with an older token, such as one on a node that was cut off, checks the file before each commit and ends. If
it has checked a moment too early, the checkpoint that it commits is invalid (svd_ds.weights.restarts), and no
run resumes from it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from svd_ds.fsync_io import fsync_path, keep_damaged_copy, replace_file, write_text
from svd_ds.settings import Settings, number
from svd_ds.weights.manifest import COMPLETE, Manifest, find_damage
from svd_ds.weights.restarts import (
    RESTARTS,
    Restart,
    complete_checkpoints,
    format_restarts,
    read_acquired_restarts,
    read_restarts,
    restarts_damage,
    restarts_path,
)
from svd_ds.weights.shards import KEPT_AVERAGES


@dataclass(frozen=True)
class CheckpointConfig(Settings, section="checkpoint"):
    """Interval and retention of checkpoints."""

    every: int = number(1000, ge=1)
    """Steps between checkpoints; the last step always saves one."""
    keep_last: int = number(2, ge=1)
    """Number of newest checkpoints that are kept."""
    keep_every: int = number(0, ge=0)
    """Checkpoints at multiples of this many steps are kept for good; 0 keeps none for good."""
    keep_averages: int = number(0, ge=0)
    """When a checkpoint at a multiple of this many steps is removed, its averages are kept in
    averages/step-N: an average of any other length can be computed from them after the run. 0 keeps none."""
    asynchronous: bool = True
    """Continue training while a checkpoint is written. This needs a copy of each rank's shards in host
    memory."""
    verify: bool = True
    """Before a run resumes, compare the checksum of every file of the checkpoint with its manifest. For this
    the files are read once more, divided over the ranks. false compares only their sizes."""


def acquire(folder: Path, step: int, origin: str = "", restart_id: tuple[int, int] = (0, 0)) -> str:
    """Make this restart of the run the owner of its folder.

    Args:
        folder: folder of the run's checkpoints.
        step: step after which the restart begins.
        origin: checkpoint named by run.resume that it descends from (svd_ds.weights.restarts.Restart).
        restart_id: Slurm job and its restart count.

    Returns:
        The fencing token.

    Raises:
        ValueError: another restart acquires the folder at the same moment.
    """
    token, path = secrets.token_hex(4), restarts_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in path.parent.glob(f"{RESTARTS}.*.new"):
        abandoned.unlink(missing_ok=True)
    job, restart = restart_id
    restarts = [*read_restarts(folder), Restart(step, time.time(), job, restart, token, origin)]
    if restarts_damage(folder) is not None:
        keep_damaged_copy(path)
    # Two restarts at once must not write into one file, so each has its own draft. The restart that replaces
    # the file last may drop the row of the other, which then ends; both fence every earlier restart.
    draft = path.with_name(f"{RESTARTS}.{token}.new")
    write_text(draft, format_restarts(restarts))
    try:
        replace_file(draft, path)
    except FileNotFoundError as error:
        raise ValueError(_fenced(folder)) from error
    if _is_fenced(folder, token):
        raise ValueError(_fenced(folder))
    # Only drafts of earlier restarts are here: a later restart acquires the folder before it writes drafts.
    for draft in folder.glob("*.tmp"):
        _remove(draft)
    for kept in (folder.parent / KEPT_AVERAGES).glob("step-*"):
        _strip(kept)
    return token


def draft_name(name: str, token: str) -> str:
    """Return the name of a checkpoint while it is written. The token keeps the drafts of two restarts
    apart."""
    return f"{name}.{token}.tmp"


def check_not_fenced(folder: Path, token: str) -> None:
    """Check that the restart with this token still owns the folder.

    Raises:
        ValueError: another restart has acquired the folder, or the folder is gone.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is gone: it was moved or removed while the run was training")
    if _is_fenced(folder, token):
        raise ValueError(_fenced(folder))


def _is_fenced(folder: Path, token: str) -> bool:
    tokens = [restart.token for restart in read_acquired_restarts(folder)]
    is_damaged = restarts_damage(folder) is not None
    if token in tokens:
        # An unreadable row after our own may be that of a later restart.
        return tokens[-1] != token or is_damaged
    # Our row is missing. Every later restart keeps the readable rows and adds its own. So if there is no row,
    # or the file is damaged, there was no later restart: only our row was lost.
    return bool(tokens) and not is_damaged


def _fenced(folder: Path) -> str:
    return f"another restart of this run has taken over {folder.parent}: this one ends and leaves it alone"


def commit(draft: Path, manifest: Manifest, config: CheckpointConfig, newest_proven: int) -> None:
    """Turn a draft whose files are all on disk into a checkpoint, and prune old checkpoints.

    Args:
        manifest: digests of the files of all ranks, and the fencing token of the restart that saved them.
        newest_proven: step of the newest proven checkpoint: neither it nor a newer one is pruned.

    Raises:
        ValueError: another restart has acquired the folder, or a rank's file is not in the draft.
        OSError: a file cannot be written.
    """
    folder, token = draft.parent, manifest.token
    check_not_fenced(folder, token)
    if damage := find_damage(draft, manifest, checksums=False):
        raise ValueError(
            f"the checkpoint {draft} lacks what a rank has written: {damage}; all "
            f"{manifest.world_size} ranks must see one run folder"
        )
    # The metrics of these steps must be on disk before the run can resume after them.
    for log in (*folder.parent.glob("*.jsonl"), *folder.parent.glob("logs/*.jsonl")):
        fsync_path(log)
    # Not `write_text`, which creates folders: a restart that has acquired the folder has removed the draft.
    (draft / COMPLETE).write_text(manifest.as_json(), encoding="utf-8")
    for written in (draft / COMPLETE, draft, *(path for path in draft.iterdir() if path.is_dir())):
        fsync_path(written)
    _publish(draft, folder / draft.name.partition(".")[0], token)
    fsync_path(folder)
    _prune(folder, token, config, newest_proven)


def _publish(draft: Path, final: Path, token: str) -> None:
    """Rename a draft to its final name. An earlier restart may have left an invalid checkpoint there."""
    check_not_fenced(final.parent, token)
    aside = final.with_name(draft_name(f"{final.name}.old", token))
    if os.path.lexists(final):
        os.replace(final, aside)
        try:
            # A process may be suspended for hours between two lines. If it still owns the folder, the folder
            # that it moved was invalid. If another restart publishes from now on, os.replace below fails.
            check_not_fenced(final.parent, token)
        except ValueError:
            os.replace(aside, final)
            raise
    os.replace(draft, final)
    _remove(aside)


def _prune(folder: Path, token: str, config: CheckpointConfig, newest_proven: int) -> None:
    """Remove old checkpoints.

    Each is renamed first, so that an interrupted prune leaves no folder that looks complete, and loses no
    averages.
    """
    complete = complete_checkpoints(folder)
    for step, path in list(complete.items())[: -config.keep_last]:
        if step >= newest_proven or (config.keep_every and step % config.keep_every == 0):
            continue
        if config.keep_averages and step % config.keep_averages == 0:
            _keep_averages(path, folder.parent / KEPT_AVERAGES / path.name)
        else:
            old = path.with_name(draft_name(f"{path.name}.old", token))
            os.replace(path, old)
            _remove(old)


def _keep_averages(checkpoint: Path, kept: Path) -> None:
    """Move a checkpoint to `kept`, and remove all but state.json, the manifest and the power-function
    averages."""
    # An earlier restart may have kept the averages of the same step.
    _remove(kept)
    kept.parent.mkdir(exist_ok=True)
    os.replace(checkpoint, kept)
    _strip(kept)


def _strip(kept: Path) -> None:
    for path in kept.iterdir():
        if path.is_dir() and not path.name.startswith("ema-power-"):
            shutil.rmtree(path)
        elif path.is_file() and path.name not in ("state.json", COMPLETE):
            path.unlink()


def _remove(path: Path) -> None:
    """Remove a folder as far as possible, a file, or a link but not its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
