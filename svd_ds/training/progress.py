"""Where a run stands, as numbers: all that a checkpoint needs besides tensors.

There is no random state here. Everything random about a clip comes from (seed, its position in the global
order).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from svd_ds.data.cursor import Cursor
from svd_ds.small_files import read_json
from svd_ds.training.guard import GuardState


@dataclass(frozen=True)
class Progress:
    cursor: Cursor
    """Position of the whole run's data."""
    step: int = 0
    """Steps done, those that the guard skipped among them."""
    samples: int = 0
    """Clips seen by all ranks together."""
    guard: GuardState = field(default_factory=GuardState)

    def advance(self, cursor: Cursor, batch: int, guard: GuardState) -> Progress:
        """After one more step over `batch` clips."""
        return Progress(cursor, self.step + 1, self.samples + batch, guard)

    def rolled_back(self, saved: Progress) -> Progress:
        """At a checkpoint's step again, but behind all clips that were seen since."""
        return replace(saved, cursor=self.cursor, guard=self.guard.rolled_back(saved.guard))

    def as_json(self) -> str:
        """What `read` reads."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def read(path: Path) -> Progress:
        """Read state.json. Raises ValueError, naming the file, where it is damaged."""
        values = read_json(path)
        try:
            guard = {**values["guard"], **{key: tuple(values["guard"][key]) for key in ("losses", "norms")}}
            return Progress(
                cursor=Cursor(**values["cursor"]),
                step=values["step"],
                samples=values["samples"],
                guard=GuardState(**guard),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: it is no state of a run ({error!r})") from error
