"""Choice of the checkpoint that a restart resumes from.

    run.resume=auto    the newest checkpoint of the run; without checkpoints the run begins at step 0
    run.resume=never   the run begins at step 0; a run folder that has checkpoints is refused
    run.resume=PATH    that checkpoint, of this run or of another

A requeued job restarts the run with the same arguments. Therefore a named checkpoint counts only until the
run has saved one that descends from it, and `never` refuses only checkpoints of other jobs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from svd_ds.parallel.env import restart_id
from svd_ds.training.checkpoint import Checkpoints
from svd_ds.weights.manifest import COMPLETE
from svd_ds.weights.restarts import find_saving_restart


@dataclass(frozen=True)
class Resume:
    """Checkpoint that a restart begins from."""

    path: Path | None
    """Folder of the checkpoint; None begins at step 0."""
    origin: str = ""
    """Named checkpoint that the run descends from (svd_ds.weights.restarts.Restart); empty without one."""
    is_own: bool = False
    """True if it is the newest of the run's own checkpoints, False if it was chosen by name."""
    note: str = ""
    """Sentence for the user about the choice; empty without one."""


def find_checkpoint(checkpoints: Checkpoints, resume: str) -> Resume:
    """Find the checkpoint that `run.resume` selects.

    Only one rank calls it: while another restart of the run still writes, two ranks could find different
    checkpoints.

    Raises:
        ValueError: the named checkpoint cannot be resumed, or run.resume is never and the run has
            checkpoints.
    """
    own = checkpoints.latest()
    saved_by = find_saving_restart(own) if own is not None else None
    origin = saved_by.origin if saved_by is not None else ""
    if resume == "auto":
        return Resume(own, origin, is_own=own is not None)
    if resume == "never":
        if own is None:
            return Resume(None)
        job, restart = restart_id()
        if saved_by is not None and job and saved_by.job == job and saved_by.restart < restart:
            return Resume(own, origin, True, f"run.resume is never, and job {job} itself has saved {own}")
        raise ValueError(f"run.resume is never, but the run folder has {own}; name another with run.dir=...")
    named = Path(resume)
    name = named.name if _same(named.parent, checkpoints.folder) else str(named.resolve())
    if own is not None and origin == name:
        return Resume(own, origin, True, f"run.resume is {named}, from which the run's own {own} descends")
    _check_named(named)
    checkpoints.check_network(named)
    return Resume(named, name)


def _check_named(path: Path) -> None:
    if not (path / "state.json").exists():
        raise ValueError(
            f"run.resume is {str(path)!r}: it must be auto, never, or the folder of a checkpoint"
        )
    if not (path / COMPLETE).exists():
        raise ValueError(
            f"run.resume is {str(path)!r}: this checkpoint is not complete: it has no file {COMPLETE}"
        )


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
