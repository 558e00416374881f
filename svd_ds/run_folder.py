"""The run folder, readable by a person:

config.yaml  metrics.jsonl  evaluation.jsonl  report.html
checkpoints/step-0000100/  samples/step-0000100/  logs/  wandb/

In config.yaml credentials are masked, and so they are where it is compared: a renewed token makes no other
config.

logs/config.yaml is a second copy of config.yaml: with one of the two damaged the run is still checked against
the config that it began with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from svd_ds.credentials import redact_tree
from svd_ds.fsync_io import replace_text, set_aside
from svd_ds.json_lines import rewrite_json_lines
from svd_ds.small_files import read_yaml

# May differ between two starts of one run: how long it goes on, what it shows, where it runs, whose code it
# is; and the guard's bounds, so that a run that it ended can go on. Where its data are as well: the cursor of
# a checkpoint has the fingerprint of the samples and their weights, and refuses others.
RESUME_MAY_CHANGE = (
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
    "data.path",
    "data.mixture",
    "data.num_workers",
    "data.prefetch",
    "data.max_quarantined",
    "data.read_timeout_seconds",
    "data.cache",
    "data.cache_gb",
    "frozen.chunk",
)


MAY_BE_MOVED = ("frozen.path", "init.from")
"""May differ too, where config.yaml has fingerprints of what stands there: see svd_ds.contents."""
CONTENTS = "contents."
YAML_END = "...\n"
"""The last line of a whole config.yaml: one that was cut short may be valid YAML too."""


def step_name(step: int) -> str:
    return f"step-{step:07d}"


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def config_copy(self) -> Path:
        return self.logs / "config.yaml"

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

    def check_config_matches(self, config: dict[str, Any]) -> str | None:
        """Refuse to resume in a folder that another config made.

        Returns:
            A sentence about a damaged config.yaml; None where it is whole, and where the run begins here.

        Raises:
            ValueError: naming the first key that differs, with both values.
        """
        config = redact_tree(config)
        saved, damage = self._read_config()
        if saved is None or (difference := _difference(saved, config)) is None:
            return damage
        key, there, here = difference
        if key.startswith(CONTENTS):
            raise ValueError(
                f"run folder {self.path} began with other weights: {key.removeprefix(CONTENTS)} has the "
                f"fingerprint {there!r} there and {here!r} here; name another folder with run.dir=..."
            )
        if damage is None and self._copy_agrees(config):
            return f"{self.config} is damaged: {key} is {there!r} there, and {here!r} in {self.config_copy}"
        raise ValueError(
            f"run folder {self.path} belongs to another config: {key} is {there!r} there and {here!r} here; "
            "name another folder with run.dir=..."
        )

    def initial_config(self) -> dict[str, Any] | None:
        """The config that made the folder; None where there is none that can be read."""
        return self._read_config()[0]

    def open(
        self, config: dict[str, Any], step: int, check_not_fenced: Callable[[], None] = lambda: None
    ) -> list[str]:
        """Make the folder for a start of the run after `step`: the rows of later steps are dropped.

        Args:
            check_not_fenced: raises ValueError where another start has taken the folder over, so that its
                files are not replaced.

        Returns:
            A sentence for each damaged file; a copy of it is kept next to it.

        Raises:
            OSError: a file cannot be written; the message names it.
        """
        config = redact_tree(config)
        check_not_fenced()
        self.logs.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        damage = []
        if (told := self._config_damage(config)) is not None:
            damage.append(
                f"{told}; it was kept as {set_aside(self.config)}" if self.config.exists() else told
            )
        # One is on disk before the other is written: no power cut damages both.
        text = yaml.safe_dump(config, sort_keys=False, explicit_end=True)
        for path in (self.config, self.config_copy):
            replace_text(path, text)
        for path in (self.metrics, self.evaluation, self.skipped, self.quarantine):
            check_not_fenced()
            damage += self.truncate_after(step, path)
        return damage

    def truncate_after(self, step: int, *paths: Path) -> list[str]:
        """Drop the rows of steps after `step`.

        Returns:
            A sentence for each file that was damaged; a copy of it is kept next to it.
        """
        found = []
        for path in paths:
            lines = rewrite_json_lines(path, lambda row: row["step"] <= step, _has_step)
            last = max((row["step"] for row in lines.rows), default=0)
            if lines.damage is not None:
                found.append(lines.damage)
            elif path == self.metrics and last < step and (self.checkpoints / step_name(step)).is_dir():
                found.append(f"{path} ends at step {last}: its rows from there to the checkpoint are lost")
        return found

    def _read_config(self) -> tuple[dict[str, Any] | None, str | None]:
        """The config that made the folder, None where none can be read; and a sentence about damage."""
        try:
            return _whole_config(self.config, end_needed=self.config_copy.exists()), None
        except FileNotFoundError:
            if not self.config_copy.exists():
                return None, None
            damage = f"{self.config} is missing"
        except ValueError as error:
            damage = str(error)
        try:
            copy = _whole_config(self.config_copy, end_needed=True)
            return copy, f"{damage}; its copy {self.config_copy} was taken"
        except (ValueError, FileNotFoundError):
            return None, f"{damage}: that the run began with this config could not be checked"

    def _config_damage(self, config: dict[str, Any]) -> str | None:
        try:
            return self.check_config_matches(config)
        except ValueError:
            return None

    def _copy_agrees(self, config: dict[str, Any]) -> bool:
        try:
            return _difference(_whole_config(self.config_copy, end_needed=True), config) is None
        except (ValueError, FileNotFoundError):
            return False


def _difference(there: dict[str, Any], here: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key, of those that must not change, that differs between two configs, and both values."""
    # One that an earlier version has written may have credentials in it.
    theirs, ours = _flat(redact_tree(there)), _flat(here)
    free = (
        RESUME_MAY_CHANGE + MAY_BE_MOVED
        if "contents" in there and "contents" in here
        else (*RESUME_MAY_CHANGE, "contents")
    )
    for key in sorted(theirs.keys() | ours.keys()):
        if not _is_free(key, free) and theirs.get(key) != ours.get(key):
            return key, theirs.get(key), ours.get(key)
    return None


def _whole_config(path: Path, end_needed: bool) -> dict[str, Any]:
    """Raises ValueError, naming the file, where it is damaged."""
    config = read_yaml(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it is {'empty' if config is None else 'no config'}")
    if end_needed and not path.read_bytes().endswith(YAML_END.encode()):
        raise ValueError(f"{path} is damaged: it was cut short")
    return config


def _has_step(row: dict[str, Any]) -> bool:
    return type(row.get("step")) is int


def _is_free(key: str, free_keys: Sequence[str]) -> bool:
    return any(key == free or key.startswith(free + ".") for free in free_keys)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(tree, dict) or (not tree and prefix):
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _flat(branch, f"{prefix}.{name}" if prefix else str(name)).items()
    }
