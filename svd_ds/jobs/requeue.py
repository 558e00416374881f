"""Rows of restarts.jsonl that tools/job.py writes before it starts the ranks, and their limit.

A job that reaches no new checkpoint in several restarts is not restarted again.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from svd_ds.fsync_io import append_row, fsync_path, keep_damaged_copy, replace_text
from svd_ds.jobs.outcome import outcome_path
from svd_ds.parallel.env import restart_id
from svd_ds.run_folder import RunFolder
from svd_ds.weights.restarts import (
    Restart,
    complete_checkpoints,
    format_restarts,
    read_restarts,
    restarts_damage,
    restarts_path,
)


def record_queued_restart(folder: RunFolder, job: int, limit: int) -> str | None:
    """Record in logs/restarts.jsonl that `job` is about to start the ranks, and discard the last outcome.

    Args:
        job: id of the Slurm job.
        limit: restarts of the job in a row that may begin after the same step.

    Returns:
        A sentence about a damaged restarts.jsonl, of which a copy is kept; None if it can be read to its end.

    Raises:
        ValueError: the last `limit` restarts of the job began after the same step as this one would; or the
            file is damaged before its tail.
    """
    folder.logs.mkdir(parents=True, exist_ok=True)
    restarts = read_restarts(folder.checkpoints)
    step = max(complete_checkpoints(folder.checkpoints), default=0)
    recent = [restart.step for restart in restarts if restart.is_queued and restart.job == job][-limit:]
    if recent == [step] * limit:
        raise ValueError(
            f"job {job} has started {folder.path} {limit} times from step {step} and never reached another "
            f"checkpoint; {folder.logs} says why"
        )
    path, row = restarts_path(folder.checkpoints), Restart(step, time.time(), job, restart_id()[1])
    if (damage := restarts_damage(folder.checkpoints)) is not None:
        damage += f"; it was kept as {keep_damaged_copy(path)}"
    if damage is not None or not _ends_with_newline(path):
        replace_text(path, format_restarts([*restarts, row]))
    else:
        # Appended, not rewritten: rank 0 of another job may add its token at the same moment. If a rewrite
        # lost that row, the process that the token fences could write again. If rank 0 replaces the file at
        # that moment, only this row is lost, and one restart is not counted.
        append_row(path, asdict(row))
        fsync_path(path)
        fsync_path(path.parent)
    outcome_path(folder).unlink(missing_ok=True)
    return damage


def is_managed_by_job(folder: RunFolder) -> bool:
    """True if tools/job.py recorded this restart: it discarded the last outcome before any rank started."""
    queued = [restart for restart in read_restarts(folder.checkpoints) if restart.is_queued]
    return bool(queued) and queued[-1].job == restart_id()[0]


def _ends_with_newline(path: Path) -> bool:
    """Return True if a row can be appended to the file, also if it is missing or empty."""
    return not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
