from __future__ import annotations

import json
from pathlib import Path

import pytest

from svd_ds.weights.restarts import RESTARTS, complete_checkpoints, newest_checkpoint
from tests.networks import seal


def mark(folder: Path, step: int, token: str) -> None:
    path = folder / f"step-{step:07d}"
    path.mkdir(parents=True)
    seal(path, token)


@pytest.mark.parametrize(
    ("lives", "counted"),
    [
        ([], [2, 4, 6, 8]),
        ([("a", 0), ("b", 6)], [2, 4, 6, 8]),
        ([("a", 0), ("b", 4)], [2, 4, 8]),
        ([("a", 0), ("b", 4), ("c", 2)], [2]),
        ([("a", 0), ("c", 2), ("b", 6)], [2, 8]),
        ([("x", 0), ("y", 2)], [2, 4, 6, 8]),
    ],
)
def test_what_a_later_life_has_left_behind_does_not_count(
    lives: list[tuple[str, int]], counted: list[int], tmp_path: Path
) -> None:
    """Life a saved steps 2, 4 and 6, life b step 8; of lives that are not told of nothing is known."""
    folder = tmp_path / "checkpoints"
    for step, token in ((2, "a"), (4, "a"), (6, "a"), (8, "b")):
        mark(folder, step, token)
    (folder / "step-0000009").mkdir()
    (folder / "step-0000010.b.tmp").mkdir()
    (folder / RESTARTS).write_text(
        "".join(json.dumps({"token": t, "start": s, "started": 0.0}) + "\n" for t, s in lives)
    )
    assert list(complete_checkpoints(folder)) == counted
    assert newest_checkpoint(tmp_path) == folder / f"step-{counted[-1]:07d}"
