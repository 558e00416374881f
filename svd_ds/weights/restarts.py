"""Which of a run's checkpoints count.

A run lives from one start to the next. Two lives may overlap: the tasks of a node that was cut off still
write when the run has been started anew. So each life is written down where it begins, and each checkpoint
bears the mark of the life that made it.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from svd_ds.json_lines import read_json_lines
from svd_ds.weights.manifest import COMPLETE, Manifest, read_manifest

logger = logging.getLogger(__name__)

RESTARTS = "lives.jsonl"
"""Beside the checkpoints: a line for each life, in order."""


@dataclass(frozen=True)
class Restart:
    token: str
    start: int
    """The step behind which it began."""
    started: float
    """When, in seconds since the epoch."""
    origin: str = ""
    """The checkpoint named by run.resume that this start and all of its checkpoints descend from, relative to
    the folder of checkpoints where it lies there; empty where none was named."""
    job: int = 0
    """The Slurm job that started it; 0 without one."""
    restart: int = 0
    """How often that job had been queued again by then."""


def read_restarts(folder: Path) -> list[Restart]:
    """The lives of the run whose checkpoints are in `folder`, in order; a damaged tail is left out.

    Raises:
        ValueError: a line that others follow cannot be read; the message names file and line.
    """
    known = {field.name for field in fields(Restart)}
    rows = read_json_lines(folder / RESTARTS, _is_life).rows
    return [Restart(**{name: value for name, value in row.items() if name in known}) for row in rows]


def restarts_damage(folder: Path) -> str | None:
    """A sentence about a damaged tail of lives.jsonl; None without one. The next start sets it aside."""
    damage = read_json_lines(folder / RESTARTS, _is_life).damage
    return damage and f"{damage}; a copy was kept next to it"


def restart_of(checkpoint: Path) -> Restart | None:
    """The start of the run that saved a checkpoint, None where it is not listed."""
    manifest = read_manifest_or_none(checkpoint)
    if manifest is None:
        return None
    return next((life for life in read_restarts(checkpoint.parent) if life.token == manifest.token), None)


def _is_life(row: dict[str, Any]) -> bool:
    kinds: dict[str, type] = {"token": str, "start": int, "started": float}
    return all(isinstance(row.get(name), kind) for name, kind in kinds.items())


def numbered_checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> each checkpoint folder that is part of the run's past, damaged ones too, oldest first.

    A checkpoint is no part of it where a later start of the run began before the checkpoint's step: what an
    earlier start left ahead of that, or still writes there, the later one never saw.
    """
    lives = read_restarts(folder)
    order = {life.token: place for place, life in enumerate(lives)}
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.is_dir():
            manifest = read_manifest_or_none(path)
            # Of an unknown start, as in a folder that was copied here, nothing is known against it.
            own = order.get(manifest.token, len(lives)) if manifest else len(lives)
            if all(life.start >= int(match[1]) for life in lives[own + 1 :]):
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Those of `numbered_checkpoints` that have a readable manifest. Whether their other files are as they
    were written is not looked at."""
    return {step: path for step, path in numbered_checkpoints(folder).items() if read_manifest_or_none(path)}


def read_manifest_or_none(checkpoint: Path) -> Manifest | None:
    """The manifest of a checkpoint; None where it is missing or damaged."""
    try:
        return read_manifest(checkpoint)
    except (ValueError, OSError):
        return None


def newest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run folder; a warning names newer ones that are incomplete.

    Raises:
        ValueError: there is none.
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
            "%s is read, for newer checkpoints have no readable COMPLETE: %s",
            complete[newest],
            ", ".join(passed),
        )
    return complete[newest]
