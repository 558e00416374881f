"""Layout of a run folder:

    config.yaml  metrics.jsonl  evaluation.jsonl  report.html
    checkpoints/step-0000100/  samples/step-0000100/  logs/  wandb/

Credentials are masked in config.yaml and are not compared: with a renewed token it is still the same config.

logs/config.yaml is a copy of config.yaml: if one of the two is damaged, a resumed run is still checked
against the config with which the run began.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from svd_ds.credentials import redact_tree
from svd_ds.fsync_io import keep_damaged_copy, replace_text
from svd_ds.json_lines import rewrite_json_lines
from svd_ds.small_files import read_yaml

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
    "deterministic",
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
"""Keys and sections that may differ when a run resumes.

They set its length, its outputs and logs, the machine, and the version of the code. The bounds of the guard
are among them, so that a run that the guard ended can resume with wider ones. The paths of the data are among
them, because the data may move: the cursor of a checkpoint has the fingerprint of the samples and refuses
others.
"""
MAY_BE_MOVED = ("frozen.path", "init.from")
"""Keys that may differ as well if config.yaml has fingerprints of the files there (svd_ds.contents)."""
CONTENTS = "contents."
"""Prefix of the keys of these fingerprints."""
YAML_END = "...\n"
"""Last line of a complete config.yaml: without it a truncated file may be valid YAML too."""


def step_name(step: int) -> str:
    """Return the name of the folder of a checkpoint, or of the previews, of one step."""
    return f"step-{step:07d}"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run folder, and the check of its config when the run resumes."""

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
        """Check that the run folder belongs to this config.

        Args:
            config: resolved config of this restart.

        Returns:
            A sentence about a damaged config.yaml; None if it is intact, or if the folder is new.

        Raises:
            ValueError: the folder belongs to another config; the message has the first key that differs and
                both values.
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
        """Return the config with which the run began; None if the run is new, or no copy can be read."""
        return self._read_config()[0]

    def open(
        self, config: dict[str, Any], step: int, check_not_fenced: Callable[[], None] = lambda: None
    ) -> list[str]:
        """Prepare the folder for a restart of the run: write config.yaml, and drop the rows of later steps.

        Args:
            config: resolved config of this restart.
            step: step from which the run resumes; 0 for a new run.
            check_not_fenced: raises ValueError if another restart has acquired the folder, whose files must
                then not be replaced.

        Returns:
            A sentence for each damaged file; a copy of the file is kept next to it.

        Raises:
            OSError: a file cannot be written; the message names it.
        """
        config = redact_tree(config)
        check_not_fenced()
        self.logs.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        damage = []
        if (found := self._config_damage(config)) is not None:
            damage.append(
                f"{found}; it was kept as {keep_damaged_copy(self.config)}" if self.config.exists() else found
            )
        # One is on disk before the other is written, so a power failure cannot damage both.
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
            A sentence for each damaged file; a copy of the file is kept next to it.
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
        """Return the config with which the run began (None if no copy can be read), and a sentence about
        damage (None if there is no damage)."""
        try:
            return _read_complete_config(self.config, end_needed=self.config_copy.exists()), None
        except FileNotFoundError:
            if not self.config_copy.exists():
                return None, None
            damage = f"{self.config} is missing"
        except ValueError as error:
            damage = str(error)
        try:
            copy = _read_complete_config(self.config_copy, end_needed=True)
            return copy, f"{damage}; its copy {self.config_copy} is used"
        except (ValueError, FileNotFoundError):
            return None, f"{damage}: it could not be checked that the run began with this config"

    def _config_damage(self, config: dict[str, Any]) -> str | None:
        try:
            return self.check_config_matches(config)
        except ValueError:
            return None

    def _copy_agrees(self, config: dict[str, Any]) -> bool:
        try:
            return _difference(_read_complete_config(self.config_copy, end_needed=True), config) is None
        except (ValueError, FileNotFoundError):
            return False


def _difference(there: dict[str, Any], here: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first key that must not differ but does, with both values; None if there is no such key."""
    # A config.yaml of an earlier version may have credentials in it.
    theirs, ours = _flat(redact_tree(there)), _flat(here)
    allowed = (
        RESUME_MAY_CHANGE + MAY_BE_MOVED
        if "contents" in there and "contents" in here
        else (*RESUME_MAY_CHANGE, "contents")
    )
    for key in sorted(theirs.keys() | ours.keys()):
        if not _may_change(key, allowed) and theirs.get(key) != ours.get(key):
            return key, theirs.get(key), ours.get(key)
    return None


def _read_complete_config(path: Path, end_needed: bool) -> dict[str, Any]:
    """Read a config.yaml.

    Args:
        end_needed: refuse a file without YAML_END.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    config = read_yaml(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it is {'empty' if config is None else 'not a config'}")
    if end_needed and not path.read_bytes().endswith(YAML_END.encode()):
        raise ValueError(f"{path} is damaged: it was cut short")
    return config


def _has_step(row: dict[str, Any]) -> bool:
    return type(row.get("step")) is int


def _may_change(key: str, allowed: Sequence[str]) -> bool:
    return any(key == entry or key.startswith(entry + ".") for entry in allowed)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts: {"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(tree, dict) or (not tree and prefix):
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _flat(branch, f"{prefix}.{name}" if prefix else str(name)).items()
    }
