"""What a run folder tells a report: run folder -> Run."""

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
"""Name of the folder of a step's samples."""


@dataclass(frozen=True)
class Run:
    name: str
    settings: dict[str, str]
    """config.yaml, flat: "optim.lr" -> "0.0001"."""
    metrics: list[Row]
    """metrics.jsonl, a line each; keys we do not know are kept and not shown."""
    evaluations: list[Row]
    """evaluation.jsonl, a line each (svd_ds.training.evaluate.EvalResult)."""
    sample_folders: dict[int, Path]
    """Step -> folder of its samples."""
    damage: tuple[str, ...] = ()
    """A sentence for each of its files that is damaged: the report lacks what cannot be read."""

    def column(self, key: str) -> list[float]:
        """One number a line of the metrics, NaN where a line has no finite number."""
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
            raise FileNotFoundError(f"{path} has no {name}, so it is not the folder of a run that has begun")
    samples = path / "samples"
    folders = [path for path in sorted(samples.glob("step-*")) if STEP.fullmatch(path.name)]
    config = read_yaml(path / "config.yaml")
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.yaml'} is damaged: it is no config of a run")
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


def _has_step(row: Row) -> bool:
    counts = (row.get(name, 0) for name in ("samples", "skipped"))
    return type(row.get("step")) is int and all(type(count) is int for count in counts)


def _is_evaluation(row: Row) -> bool:
    by_sigma = [row.get(name) for name in ("sigma", "loss", "loss_average", "grad_norm")]
    by_frame = [row.get(name) for name in ("loss_by_frame", "grad_norm_by_frame")]
    return (
        _has_step(row)
        and {"samples", "set", "clips"} <= row.keys()
        and all(isinstance(each, list) and all(map(_is_real, each)) for each in (*by_sigma, *by_frame))
        and len({len(each) for each in by_sigma if each}) == 1
    )


def _is_real(value: Any) -> bool:
    return is_number(value) or (isinstance(value, float) and not math.isfinite(value))


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: "null" if tree is None else str(tree)}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _flat(branch, f"{prefix}.{name}" if prefix else str(name)).items()
    }
