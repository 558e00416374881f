"""Where a run stands, as numbers: all that a checkpoint needs besides tensors.

There is no random state here. Everything random about a clip comes from (seed, its position in the global
order).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from svd_ds.data.cursor import Cursor


@dataclass(frozen=True)
class Progress:
    cursor: Cursor
    """Position of the whole run's data."""
    step: int = 0
    """Optimiser steps done."""
    samples: int = 0
    """Clips seen by all ranks together."""

    def advance(self, cursor: Cursor, batch: int) -> Progress:
        """After one more step over `batch` clips."""
        return Progress(cursor=cursor, step=self.step + 1, samples=self.samples + batch)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> Progress:
        values = json.loads(path.read_text())
        return Progress(cursor=Cursor(**values["cursor"]), step=values["step"], samples=values["samples"])
