"""Checkpoints that count, given the restarts of a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from svd_ds.weights.restarts import Restart, complete_checkpoints, newest_checkpoint, restarts_path
from tests.networks import seal


def mark(folder: Path, step: int, token: str) -> None:
    path = folder / f"step-{step:07d}"
    path.mkdir(parents=True)
    seal(path, token)


@pytest.mark.parametrize(
    ("restarts", "counted"),
    [
        ([], [2, 4, 6, 8]),
        ([("a", 0), ("b", 6)], [2, 4, 6, 8]),
        ([("a", 0), ("b", 4)], [2, 4, 8]),
        ([("a", 0), ("b", 4), ("c", 2)], [2]),
        ([("a", 0), ("c", 2), ("b", 6)], [2, 8]),
        ([("x", 0), ("y", 2)], [2, 4, 6, 8]),
        ([("a", 0), ("", 0), ("b", 6), ("", 2)], [2, 4, 6, 8]),
    ],
)
def test_checkpoint_after_the_first_step_of_a_later_restart_is_invalid(
    restarts: list[tuple[str, int]], counted: list[int], tmp_path: Path
) -> None:
    """Restart a saved steps 2, 4 and 6, restart b step 8, and "" is a queued one. Checkpoints of a restart
    that is not listed are valid."""
    folder = tmp_path / "checkpoints"
    for step, token in ((2, "a"), (4, "a"), (6, "a"), (8, "b")):
        mark(folder, step, token)
    (folder / "step-0000009").mkdir()
    (folder / "step-0000010.b.tmp").mkdir()
    restarts_path(folder).parent.mkdir()
    restarts_path(folder).write_text(
        "".join(json.dumps(asdict(Restart(step, 0.0, token=token))) + "\n" for token, step in restarts)
    )
    assert list(complete_checkpoints(folder)) == counted
    assert newest_checkpoint(tmp_path) == folder / f"step-{counted[-1]:07d}"
