"""Outcome of a job: how the newest restart of a run ended. The launcher reads it.

logs/outcome.json           outcome of the newest restart; missing if it was killed
logs/outcome-0123abcd.json  outcome of a restart that lost the run folder to another; 0123abcd is its token
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from svd_ds.credentials import redact
from svd_ds.fsync_io import create_text, replace_text
from svd_ds.parallel.env import restart_id
from svd_ds.run_folder import RunFolder
from svd_ds.small_files import read_json

FINISHED = "finished"
PREEMPTED = "preempted"
"""Stopped on request, after a checkpoint."""
REFUSED = "refused"
"""Ended by a user's mistake: another restart would end in the same way."""
INTERRUPTED = "interrupted"
"""Stopped by a person at the terminal, or with W&B's stop button."""
FAILED = "failed"
BAD_NODES = "bad nodes"
"""Stopped, after a checkpoint, because nodes compute wrongly: the job resumes without them."""


@dataclass(frozen=True)
class JobOutcome:
    """Outcome of one restart."""

    kind: str
    """One of the constants above."""
    rank: int
    """Rank that recorded it."""
    message: str
    restart_id: tuple[int, int]
    """Restart that ended (svd_ds.parallel.env.restart_id). It tells this outcome from those of earlier
    restarts, whose ranks may still write from a node that was cut off."""
    nodes: dict[str, str] = field(default_factory=dict)
    """Host -> why the next restart should not use it."""

    @staticmethod
    def read(folder: RunFolder) -> JobOutcome | None:
        """Read the outcome of the caller's own restart; None while no rank has recorded one."""
        for path in (outcome_path(folder), *sorted(folder.logs.glob("outcome-*.json"))):
            outcome = _read_outcome(path)
            if outcome is not None and outcome.restart_id == restart_id():
                return outcome
        return None

    def record(self, path: Path) -> bool:
        """Write the file unless an outcome of this restart is there already; return True if it was written.

        Raises:
            OSError: the file cannot be written.
        """
        text = json.dumps(asdict(self) | {"message": redact(self.message)}) + "\n"
        try:
            create_text(path, text)
        except FileExistsError:
            recorded = _read_outcome(path)
            if recorded is None or recorded.restart_id >= self.restart_id:
                return False
            replace_text(path, text)
        return True


def outcome_path(folder: RunFolder, token: str = "") -> Path:
    """Path of an outcome.

    Args:
        token: fencing token of a restart that lost the run folder to another; empty for the newest restart.
    """
    return folder.logs / (f"outcome-{token}.json" if token else "outcome.json")


def _read_outcome(path: Path) -> JobOutcome | None:
    """Read the outcome in a file, of any restart; None if it is missing or damaged."""
    try:
        values = read_json(path)
        nodes = {str(host): str(why) for host, why in values.get("nodes", {}).items()}
        return JobOutcome(**values | {"restart_id": tuple(values["restart_id"]), "nodes": nodes})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
