"""Progress of a run: everything that a checkpoint holds besides tensors.

It has no state of random generators: all random numbers of a clip are drawn from (seed, sample ordinal).
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
    """Progress of a run after a step, the same on all ranks."""

    cursor: Cursor
    """Position in the data: the next sample ordinal, over all ranks."""
    step: int = 0
    """Number of steps done, including those that the guard skipped."""
    samples: int = 0
    """Number of clips seen by all ranks together."""
    guard: GuardState = field(default_factory=GuardState)

    def advance(self, cursor: Cursor, batch: int, guard: GuardState) -> Progress:
        """Return the progress after one more step.

        Args:
            cursor: cursor after the step.
            batch: number of clips in the step, over all ranks.
            guard: state of the guard after the step.
        """
        return Progress(cursor, self.step + 1, self.samples + batch, guard)

    def rolled_back(self, saved: Progress) -> Progress:
        """Return the progress after a rollback: that of the checkpoint, `saved`, but the data order
        continues."""
        return replace(saved, cursor=self.cursor, guard=self.guard.rolled_back(saved.guard))

    def as_json(self) -> str:
        """Return the content of state.json."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def read(path: Path) -> Progress:
        """Read state.json.

        Raises:
            ValueError: the file is damaged; the message names it.
        """
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
            raise ValueError(f"{path} is damaged: it is not the state of a run ({error!r})") from error
