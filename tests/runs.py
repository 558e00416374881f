"""Readers of a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def metrics(run: Path) -> list[dict[str, Any]]:
    """Complete rows of metrics.jsonl; none before the file exists."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
