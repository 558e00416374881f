"""How an attempt at a run ended, as its launcher reads it.

logs/outcome.json           of the newest attempt; missing where it was killed
logs/outcome-0123abcd.json  of an attempt that another start took the folder over from
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
"""Asked to stop, it left a checkpoint."""
REFUSED = "refused"
"""A user's mistake: another attempt would end the same."""
INTERRUPTED = "interrupted"
"""By a person at the terminal, or with W&B's stop button."""
FAILED = "failed"
BAD_NODES = "bad nodes"
"""Some of its nodes compute wrongly: it goes on without them, from a checkpoint."""


@dataclass(frozen=True)
class JobOutcome:
    kind: str
    rank: int
    message: str
    restart_id: tuple[int, int]
    """svd_ds.parallel.env.restart_id: ranks of an earlier one, on a node that was cut off, may still speak."""
    nodes: dict[str, str] = field(default_factory=dict)
    """Hosts that another attempt should do without, and why."""

    @staticmethod
    def read(folder: RunFolder) -> JobOutcome | None:
        """Of this attempt, in which the caller takes part; None where nobody has said it yet."""
        for path in (outcome_path(folder), *sorted(folder.logs.glob("outcome-*.json"))):
            told = _told(path)
            if told is not None and told.restart_id == restart_id():
                return told
        return None

    def record(self, path: Path) -> bool:
        """Write the file where nobody has told an outcome of this attempt yet; return whether that is so.

        Raises:
            OSError: it cannot be written.
        """
        text = json.dumps(asdict(self) | {"message": redact(self.message)}) + "\n"
        try:
            create_text(path, text)
        except FileExistsError:
            told = _told(path)
            if told is None or told.restart_id >= self.restart_id:
                return False
            replace_text(path, text)
        return True


def outcome_path(folder: RunFolder, token: str = "") -> Path:
    """The file of an outcome; `token`: of a start that another one took the folder over from."""
    return folder.logs / (f"outcome-{token}.json" if token else "outcome.json")


def _told(path: Path) -> JobOutcome | None:
    """By whichever attempt spoke last; None where nobody did, or where what it said cannot be read."""
    try:
        values = read_json(path)
        nodes = {str(host): str(why) for host, why in values.get("nodes", {}).items()}
        return JobOutcome(**values | {"restart_id": tuple(values["restart_id"]), "nodes": nodes})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
