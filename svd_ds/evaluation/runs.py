"""Content of a run folder, for reports."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from svd_ds.credentials import redact_tree
from svd_ds.json_lines import read_json_lines
from svd_ds.small_files import is_number, read_yaml

Row = dict[str, Any]
STEP = re.compile(r"step-[0-9]{1,15}")
"""Name of the folder with the samples of a step."""


@dataclass(frozen=True)
class Run:
    """Settings, metrics, evaluations and samples of a run."""

    name: str
    settings: dict[str, str]
    """config.yaml, flattened: "optim.lr" -> "0.0001"."""
    metrics: list[Row]
    """Lines of metrics.jsonl; unknown keys are kept."""
    evaluations: list[Row]
    """Lines of evaluation.jsonl (svd_ds.training.evaluate.EvalResult)."""
    sample_folders: dict[int, Path]
    """Step -> folder of its samples."""
    damage: tuple[str, ...] = ()
    """A sentence for each damaged file; its unreadable parts are omitted."""

    def column(self, key: str) -> list[float]:
        """Return one number for each line of the metrics, NaN if the line has none."""
        return [float(line[key]) if is_number(line.get(key)) else math.nan for line in self.metrics]


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        FileNotFoundError: the folder, its config or its metrics are missing.
        ValueError: config.yaml is damaged.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"there is no run folder {path}")
    for name in ("config.yaml", "metrics.jsonl"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} has no {name}: it is not a run folder")
    samples = path / "samples"
    folders = [path for path in sorted(samples.glob("step-*")) if STEP.fullmatch(path.name)]
    config = read_yaml(path / "config.yaml")
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.yaml'} is damaged: it must be a mapping")
    metrics = read_json_lines(path / "metrics.jsonl", _has_step, skip_bad=True)
    evaluations = read_json_lines(path / "evaluation.jsonl", _is_evaluation, skip_bad=True)
    return Run(
        name=path.resolve().name,
        settings=_flat(redact_tree(config)),
        metrics=metrics.rows,
        evaluations=evaluations.rows,
        sample_folders={int(folder.name.removeprefix("step-")): folder for folder in folders},
        damage=tuple(filter(None, (metrics.damage, evaluations.damage))),
    )


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read several run folders. Runs are named by their folder, or by the given path if two folders have
    the same name."""
    runs = [read_run(path) for path in paths]
    if len({run.name for run in runs}) == len(runs):
        return runs
    return [replace(run, name=str(path)) for run, path in zip(runs, paths, strict=True)]


def split_common_prefix(names: Sequence[str]) -> tuple[str, list[str]]:
    """Split names into the common part before their first dash, and the remainder of each name.

    Without a common part the result is "" and the names.

    ("noise_schedule-edm", "noise_schedule-cosine") -> "noise_schedule", ["edm", "cosine"]
    """
    parts = [match.groups() for name in names if (match := re.fullmatch(r"([^-/]+)-(.+)", name))]
    if len(names) < 2 or len(parts) < len(names) or len({common for common, _ in parts}) > 1:
        return "", list(names)
    return parts[0][0], [remainder for _, remainder in parts]


def _has_step(row: Row) -> bool:
    counts = (row.get(name, 0) for name in ("samples", "skipped"))
    return type(row.get("step")) is int and all(type(count) is int for count in counts)


def _is_evaluation(row: Row) -> bool:
    sigma_lists = [row.get(name) for name in ("sigma", "loss", "loss_average", "grad_norm")]
    frame_lists = [row.get(name) for name in ("loss_by_frame", "grad_norm_by_frame")]
    return (
        _has_step(row)
        and {"samples", "set", "clips"} <= row.keys()
        and all(isinstance(each, list) and all(map(_is_real, each)) for each in (*sigma_lists, *frame_lists))
        and len({len(each) for each in sigma_lists if each}) == 1
    )


def _is_real(value: Any) -> bool:
    return is_number(value) or (isinstance(value, float) and not math.isfinite(value))


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """Flatten a tree: {"a": {"b": 1}} -> {"a.b": "1"}."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: "null" if tree is None else str(tree)}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _flat(branch, f"{prefix}.{name}" if prefix else str(name)).items()
    }
