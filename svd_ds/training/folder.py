"""The run folder, readable by a person:

config.yaml  metrics.jsonl  evaluation.jsonl  report.html
checkpoints/step-0000100/  samples/step-0000100/  logs/  wandb/
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# May differ between two starts of one run: how long it goes on, what it shows, where it runs, whose code it
# is; and the guard's bounds, so that a run that it ended can go on.
FREE_KEYS = (
    "code",
    "run.dir",
    "run.steps",
    "run.resume",
    "checkpoint",
    "sampling",
    "evaluation",
    "guard",
    "watchdog",
    "logger",
    "model.kernels",
    "parallel",
    "recompute",
    "ema.on_host",
    "batch.micro",
    "data.num_workers",
    "data.prefetch",
    "data.max_quarantined",
    "data.stall_seconds",
    "data.cache",
    "data.cache_gb",
    "frozen.chunk",
)


def step_name(step: int) -> str:
    return f"step-{step:07d}"


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.jsonl"

    @property
    def skipped(self) -> Path:
        return self.logs / "skipped.jsonl"

    @property
    def quarantine(self) -> Path:
        return self.logs / "quarantine.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def samples(self, step: int) -> Path:
        return self.path / "samples" / step_name(step)

    def check_belongs(self, config: dict[str, Any]) -> None:
        """Refuse to go on with a folder that another config made.

        Raises ValueError naming the first key that differs, with both values.
        """
        if not self.config.exists():
            return
        there, here = _flat(yaml.safe_load(self.config.read_text())), _flat(config)
        for key in sorted(there.keys() | here.keys()):
            if _is_free(key) or there.get(key) == here.get(key):
                continue
            raise ValueError(
                f"run folder {self.path} belongs to another config: {key} is {there.get(key)!r} there and "
                f"{here.get(key)!r} here; name another folder with run.dir=..."
            )

    def open(self, config: dict[str, Any], step: int) -> None:
        """Make the folder for a life of the run that begins after `step`: what was told of later ones is
        dropped."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        _write_atomically(self.config, yaml.safe_dump(config, sort_keys=False))
        self.drop_after(step, self.metrics, self.evaluation, self.skipped, self.quarantine)

    def drop_after(self, step: int, *paths: Path) -> None:
        """Leave out the lines of steps behind `step`."""
        for path in paths:
            kept = [line for line in whole_lines(path) if json.loads(line)["step"] <= step]
            if kept or path.exists():
                _write_atomically(path, "".join(kept))


def whole_lines(path: Path) -> list[str]:
    """The lines of a file with a JSON object on each, their ends included."""
    if not path.exists():
        return []
    # A killed writer may leave half a line at the end.
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE_KEYS)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _flat(branch, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
