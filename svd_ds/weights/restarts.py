"""Restarts of a run, and the checkpoints that count for it. A checkpoint is

- complete if its manifest, the file COMPLETE, can be read; it is written last;
- intact if every file has the size and the checksum that the manifest lists, else damaged;
- valid unless a later restart has begun before its step (`numbered_checkpoints`);
- proven if a training step from its weights was taken, not skipped by the guard.

    logs/restarts.jsonl   one row per restart of the run, the first start included, oldest first

Restarts may overlap: the processes of a node that was cut off can still write after the run was restarted on
another node. Each restart is therefore recorded with the step after which it begins, and the manifest of a
checkpoint names the restart that saved it.

There are two kinds of rows. Rank 0 writes an *acquired* row, which has a token, when it acquires the run
folder (svd_ds.training.retention): these alone decide who may write and which checkpoints are valid.
tools/job.py writes a *queued* row, without a token, before the ranks start: these alone count for
--max-restarts.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from svd_ds.json_lines import read_json_lines
from svd_ds.weights.manifest import COMPLETE, Manifest, read_manifest

logger = logging.getLogger(__name__)

RESTARTS = "restarts.jsonl"
"""File name of the restarts, in the folder logs of a run."""


@dataclass(frozen=True)
class Restart:
    """One row of logs/restarts.jsonl."""

    step: int
    """Step after which the restart begins."""
    time: float
    """Time of the row, in seconds since the epoch."""
    job: int = 0
    """Id of the Slurm job; 0 without one."""
    restart: int = 0
    """Slurm's restart count of the job."""
    token: str = ""
    """Fencing token; empty in a queued row."""
    origin: str = ""
    """Checkpoint named by run.resume from which this restart and its checkpoints descend: its name if it is
    in the run's own folder of checkpoints, else its absolute path. Empty if no checkpoint was named."""

    @property
    def is_queued(self) -> bool:
        """True if tools/job.py wrote the row before the ranks started."""
        return not self.token


def restarts_path(checkpoints: Path) -> Path:
    """Return the path of restarts.jsonl of the run whose folder of checkpoints is `checkpoints`."""
    return checkpoints.parent / "logs" / RESTARTS


def read_restarts(checkpoints: Path) -> list[Restart]:
    """Read all rows, oldest first; a damaged tail is left out.

    Raises:
        ValueError: a row before readable ones cannot be read; the message names file and line.
    """
    names = [field.name for field in fields(Restart)]
    rows = read_json_lines(restarts_path(checkpoints), _is_restart).rows
    return [Restart(**{name: row[name] for name in names}) for row in rows]


def format_restarts(restarts: Iterable[Restart]) -> str:
    """Return the content of restarts.jsonl with these rows, which `read_restarts` reads."""
    return "".join(json.dumps(asdict(restart)) + "\n" for restart in restarts)


def read_acquired_restarts(checkpoints: Path) -> list[Restart]:
    """Read the rows of the restarts that acquired the run folder, oldest first.

    Raises:
        ValueError: see `read_restarts`.
    """
    return [restart for restart in read_restarts(checkpoints) if not restart.is_queued]


def restarts_damage(checkpoints: Path) -> str | None:
    """Return a sentence about a damaged tail of restarts.jsonl; None if all rows can be read.

    The next restart keeps a copy of the damaged file and repairs it.
    """
    return read_json_lines(restarts_path(checkpoints), _is_restart).damage


def find_saving_restart(checkpoint: Path) -> Restart | None:
    """Find the restart that saved a checkpoint; None if restarts.jsonl does not list it."""
    manifest = read_manifest_or_none(checkpoint)
    if manifest is None:
        return None
    restarts = read_acquired_restarts(checkpoint.parent)
    return next((restart for restart in restarts if restart.token == manifest.token), None)


def _is_restart(row: dict[str, Any]) -> bool:
    # Every field is required: a row that lost its token by damage must not pass for a queued one.
    types: dict[str, Any] = {
        "step": int, "time": (int, float), "job": int, "restart": int, "token": str, "origin": str
    }  # fmt: skip
    return all(isinstance(row.get(name), kind) for name, kind in types.items())


def numbered_checkpoints(folder: Path) -> dict[int, Path]:
    """Return step -> folder of each valid checkpoint, oldest first; it need not be complete or intact.

    A checkpoint is invalid once a later restart has begun before its step. That restart does not continue
    from it; an earlier restart saved it before, or still writes from a node that was cut off.
    """
    restarts = read_acquired_restarts(folder)
    order = {restart.token: index for index, restart in enumerate(restarts)}
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.is_dir():
            manifest = read_manifest_or_none(path)
            # A checkpoint of a restart that is not listed is valid, as in a folder that was copied here.
            index = order.get(manifest.token, len(restarts)) if manifest else len(restarts)
            if all(restart.step >= int(match[1]) for restart in restarts[index + 1 :]):
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Return step -> folder of each checkpoint that is valid and complete, oldest first."""
    return {step: path for step, path in numbered_checkpoints(folder).items() if read_manifest_or_none(path)}


def read_manifest_or_none(checkpoint: Path) -> Manifest | None:
    """Read the manifest of a checkpoint; None if it is missing or damaged."""
    try:
        return read_manifest(checkpoint)
    except (ValueError, OSError):
        return None


def newest_checkpoint(run: Path) -> Path:
    """Find the newest valid and complete checkpoint of a run folder; newer incomplete ones cause a warning.

    Raises:
        ValueError: the run has no complete checkpoint.
    """
    numbered = numbered_checkpoints(run / "checkpoints")
    complete = {step: path for step, path in numbered.items() if read_manifest_or_none(path)}
    if not complete:
        names = ", ".join(path.name for path in numbered.values())
        damaged = f": no {COMPLETE} can be read in {names}" if names else ""
        raise ValueError(f"the run {run} has no complete checkpoint yet{damaged}")
    newest = max(complete)
    if passed := [path.name for step, path in numbered.items() if step > newest]:
        logger.warning(
            "%s is read, because newer checkpoints have no readable COMPLETE: %s",
            complete[newest],
            ", ".join(passed),
        )
    return complete[newest]
