"""What a run folder tells a report: run folder -> Run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    name: str
    settings: dict[str, str]
    """config.yaml, flat: "optim.lr" -> "0.0001"."""
    metrics: list[Row]
    """metrics.jsonl, a line each; keys we do not know are kept and not shown."""
    evaluations: list[Row]
    """evaluation.jsonl, a line each (svd_ds.training.evaluate.Measured)."""
    sample_folders: dict[int, Path]
    """Step -> folder of its samples."""

    def column(self, key: str) -> list[float]:
        """One number a line of the metrics, NaN where a line lacks it."""
        return [float(line[key]) if line.get(key) is not None else math.nan for line in self.metrics]


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises FileNotFoundError when the folder or its metrics are missing, ValueError for a line that is no
    JSON.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"there is no run folder {path}")
    for name in ("config.yaml", "metrics.jsonl"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} has no {name}, so it is not the folder of a run that has begun")
    samples = path / "samples"
    folders = sorted(samples.glob("step-*")) if samples.is_dir() else []
    return Run(
        name=path.resolve().name,
        settings=_flat(yaml.safe_load((path / "config.yaml").read_text())),
        metrics=_read_lines(path / "metrics.jsonl"),
        evaluations=_read_lines(path / "evaluation.jsonl"),
        sample_folders={int(folder.name.removeprefix("step-")): folder for folder in folders},
    )


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read several, under names that differ: folder names, or the paths as given where two have one name."""
    runs = [read_run(path) for path in paths]
    if len({run.name for run in runs}) == len(runs):
        return runs
    return [replace(run, name=str(path)) for run, path in zip(runs, paths, strict=True)]


def short_names(names: Sequence[str]) -> tuple[str, list[str]]:
    """What all names have before their first dash, and what is left of each; "" and the names otherwise.

    ("noise_schedule-edm", "noise_schedule-cosine") -> "noise_schedule", ["edm", "cosine"]
    """
    parts = [match.groups() for name in names if (match := re.fullmatch(r"([^-/]+)-(.+)", name))]
    if len(names) < 2 or len(parts) < len(names) or len({common for common, _ in parts}) > 1:
        return "", list(names)
    return parts[0][0], [rest for _, rest in parts]


def _read_lines(path: Path) -> list[Row]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # half a line: the run is being written, or was killed
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not JSON: {error}") from error
    return rows


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: "null" if tree is None else str(tree)}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _flat(branch, f"{prefix}.{name}" if prefix else str(name)).items()
    }
