from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run's checkpoints; the restarts are in logs/ next to it."""
    path = tmp_path / "checkpoints"
    path.mkdir()
    return path
