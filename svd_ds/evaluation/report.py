"""A run, or several side by side, as one HTML file that needs nothing else: curves, settings, sampled videos.

run folder -> Run (settings, metrics, samples) -> assets/report.html.jinja -> FILE.html
"""

from __future__ import annotations

import base64
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml

from svd_ds.evaluation.charts import COLOURS, Curve, chart, smoothed

MAX_SAMPLED_STEPS = 6
"""Sampled steps shown, evenly chosen, the newest always: videos make the file large."""

CHARTS = {
    "loss": ("Loss", True),
    "grad_norm": ("Gradient norm", True),
    "lr": ("Learning rate", False),
    "clips_per_s": ("Clips a second", True),
}
"""Key in metrics.jsonl -> title, and whether it is noisy enough to smooth."""


@dataclass(frozen=True)
class Sample:
    """What was sampled at one step: base64 of the files, by name."""

    sheet: str | None
    videos: dict[str, str]


@dataclass(frozen=True)
class Run:
    name: str
    settings: dict[str, str]
    """config.yaml, flat: "optim.lr" -> "0.0001"."""
    metrics: list[dict[str, Any]]
    """metrics.jsonl, a line each; keys we do not know are kept and not shown."""
    sample_folders: dict[int, Path]
    """Step -> folder of its samples."""

    def column(self, key: str) -> list[float]:
        """One number a line, NaN where a line lacks it."""
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
        metrics=_read_metrics(path / "metrics.jsonl"),
        sample_folders={int(folder.name.removeprefix("step-")): folder for folder in folders},
    )


def write_report(run_dirs: Sequence[Path | str], out_path: Path | str) -> None:
    """Write the report of one run, or of several compared, to `out_path`."""
    if not run_dirs:
        raise ValueError("a report needs at least one run folder")
    runs = _with_distinct_names([read_run(Path(path)) for path in run_dirs], run_dirs)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("svd_ds") / "assets" / "report.html.jinja").read_text())
    steps = _shown_steps(runs)
    html = template.render(
        title=" · ".join(run.name for run in runs),
        names=[run.name for run in runs],
        colours=[COLOURS[i % len(COLOURS)] for i in range(len(runs))],
        facts=[_facts(run) for run in runs],
        charts=_charts(runs),
        steps=steps,
        samples=[_samples(run, steps) for run in runs],
        differing=_differing(runs),
        settings=[run.settings for run in runs],
    )
    out_path = Path(out_path)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    out_path.write_text(html)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # half a line: the run is being written, or was killed
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not JSON: {error}") from error
    return metrics


def _charts(runs: Sequence[Run]) -> list[str]:
    """SVG of each chart for which any run has numbers."""
    # Runs of different batch size meet only on the count of clips.
    x_key, x_label = ("step", "step") if len(runs) == 1 else ("samples", "clips seen")
    result = []
    for key, (title, smooth) in CHARTS.items():
        curves = [Curve(run.name, run.column(x_key), run.column(key)) for run in runs]
        if any(math.isfinite(value) for curve in curves for value in curve.y):
            result.append(chart(title, curves, x_label, smooth))
    return result


def _facts(run: Run) -> dict[str, str]:
    """The numbers that one asks for first."""
    if not run.metrics:
        return {"steps": "0"}
    last = run.metrics[-1]
    rates = [rate for rate in run.column("clips_per_s") if math.isfinite(rate)]
    seconds = sum(value for value in run.column("step_s") if math.isfinite(value))
    facts = {"steps": f"{last['step']:,}", "clips seen": f"{last['samples']:,}"}
    facts["loss, smoothed"] = f"{smoothed(run.column('loss'))[-1]:.4f}"
    if rates:
        facts["clips a second, median"] = f"{statistics.median(rates):.3g}"
    if seconds:
        facts["time in steps"] = _duration(seconds)
    return facts


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Setting -> its value in every run, for settings that are not the same in all."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = {key: [run.settings.get(key, "—") for run in runs] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _shown_steps(runs: Sequence[Run]) -> list[int]:
    """Newest first."""
    steps = sorted({step for run in runs for step in run.sample_folders}, reverse=True)
    if len(steps) <= MAX_SAMPLED_STEPS:
        return steps
    return [steps[round(i * (len(steps) - 1) / (MAX_SAMPLED_STEPS - 1))] for i in range(MAX_SAMPLED_STEPS)]


def _samples(run: Run, steps: Sequence[int]) -> dict[int, Sample]:
    samples = {}
    for step in steps:
        if (folder := run.sample_folders.get(step)) is not None:
            sheet = folder / "contact_sheet.png"
            videos = {path.stem: _base64(path) for path in sorted(folder.glob("*.mp4"))}
            samples[step] = Sample(_base64(sheet) if sheet.is_file() else None, videos)
    return samples


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")


def _with_distinct_names(runs: list[Run], given: Sequence[Path | str]) -> list[Run]:
    """Folder names, or the paths as given where two folders have one name."""
    if len({run.name for run in runs}) == len(runs):
        return runs
    return [replace(run, name=str(path)) for run, path in zip(runs, given, strict=True)]


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: "null" if tree is None else str(tree)}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _flat(branch, f"{prefix}.{name}" if prefix else str(name)).items()
    }
