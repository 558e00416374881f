"""Which of a run's checkpoints count.

A run lives from one start to the next. Two lives may overlap: the tasks of a node that was cut off still
write when the run has been started anew. So each life is written down where it begins, and each checkpoint
bears the mark of the life that made it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

COMPLETE = "COMPLETE"
"""The file that a checkpoint gets last. It holds the token of a life."""
LIVES = "lives.jsonl"
"""Beside the checkpoints: a line for each life, in order."""


@dataclass(frozen=True)
class Life:
    token: str
    start: int
    """The step behind which it began."""
    started: float
    """When, in seconds since the epoch."""


def lives_of(folder: Path) -> list[Life]:
    """The lives of the run whose checkpoints are in `folder`, in order."""
    path = folder / LIVES
    return [Life(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> each checkpoint in a run's folder of them that counts, oldest first.

    One that is finished does not count where a later life of the run began before its step: what an earlier
    life left ahead of that, or still writes there, is no part of the later one's past.
    """
    lives = lives_of(folder)
    order = {life.token: place for place, life in enumerate(lives)}
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / COMPLETE).exists():
            # Of a life that is not told of, as in a folder that was copied here, nothing is known against it.
            own = order.get((path / COMPLETE).read_text(), len(lives))
            if all(life.start >= int(match[1]) for life in lives[own + 1 :]):
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def newest_checkpoint(run: Path) -> Path:
    """The last complete checkpoint of a run folder. ValueError where there is none."""
    complete = complete_checkpoints(run / "checkpoints")
    if not complete:
        raise ValueError(f"the run {run} has no complete checkpoint yet")
    return complete[max(complete)]
