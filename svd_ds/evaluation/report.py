"""HTML report of a run, or a comparison of several, as one self-contained file.

run folders -> Run (runs.py) -> charts, ranking (fixed_set.py) -> assets/report.html.jinja -> FILE.html
"""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from svd_ds.evaluation import fixed_set
from svd_ds.evaluation.charts import Chart, Curve, draw_chart, draw_chart_grid, run_colours, smoothed
from svd_ds.evaluation.runs import Run, read_runs, split_common_prefix
from svd_ds.fsync_io import replace_text
from svd_ds.small_files import is_number, read_json, read_regular

MAX_SAMPLED_STEPS = 6
"""Maximum number of sampled steps that are shown, evenly spaced, always with the newest: videos make the
file large."""
MAX_COMPARED_STEPS = 2
"""The same limit for a comparison of several runs."""
MAX_SHEETS = 3
"""Maximum number of compared runs that also show a contact sheet each."""

MAX_MEDIA = 2**28
"""Maximum size of a picture or a video in bytes."""
PNG_SIGNATURE, MP4_SIGNATURE = (0, b"\x89PNG\r\n\x1a\n"), (4, b"ftyp")
"""(offset, bytes) that identify the file type."""

CHARTS = {
    "loss": ("Training loss", "weighted error", True),
    "reconstruction": ("Reconstruction loss", "mean absolute error", True),
    "perceptual": ("Perceptual distance", "LPIPS", True),
    "adversarial": ("Adversarial loss", "negative score", True),
    "discriminator": ("Discriminator loss", "hinge loss", True),
    "grad_norm": ("Gradient norm before clipping", "norm", True),
    "lr": ("Learning rate", "rate", False),
    "clips_per_s": ("Throughput", "clips per second", True),
}
"""Key in metrics.jsonl -> title, label of the y axis, whether the curve is noisy enough to smooth. Keys
that no run has are skipped."""


@dataclass(frozen=True)
class EvaluationSection:
    """Content of the section on the fixed evaluation set."""

    num_clips: int
    num_sigmas: int
    charts: list[str]
    charts_by_bin: str
    """Small charts, one for each bin of sigma."""


@dataclass(frozen=True)
class SampleSection:
    """Videos and pictures sampled at one step, as base64 by name, and their measures."""

    sheet: str | None
    videos: dict[str, str]
    measured: dict[str, float]


def write_report(run_dirs: Sequence[Path | str], out_path: Path | str) -> list[str]:
    """Write the report of one run, or a comparison of several, to `out_path`.

    Returns:
        A sentence for each damaged file of the runs; the report omits its unreadable parts.

    Raises:
        ValueError: there are no run folders, or a file of a run is damaged beyond use.
        FileNotFoundError: a run folder or one of its files does not exist.
    """
    if not run_dirs:
        raise ValueError("a report needs at least one run folder")
    common, runs = _shorten_names(read_runs([Path(path) for path in run_dirs]))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("svd_ds") / "assets" / "report.html.jinja").read_text())
    steps = _shown_steps(runs)
    facts = [_facts(run) for run in runs]
    samples = [_samples(run, steps) for run in runs]
    comparison = f"{common}: {len(runs)} runs" if common else f"Comparison of {len(runs)} runs"
    html = template.render(
        title=runs[0].name if len(runs) == 1 else comparison,
        names=[run.name for run in runs],
        colours=run_colours(len(runs)),
        facts=facts,
        fact_names=list(dict.fromkeys(name for run_facts in facts for name in run_facts)),
        ranking=fixed_set.rank_runs(runs),
        unranked_reason=fixed_set.explain_missing_ranking(runs),
        low=fixed_set.LOW_SIGMA,
        high=fixed_set.HIGH_SIGMA,
        evaluation=_evaluation_section(runs),
        charts=_charts(runs),
        steps=steps,
        samples=samples,
        video_names={step: _video_names(samples, step) for step in steps},
        with_sheets=len(runs) <= MAX_SHEETS,
        differing=_differing(runs),
        settings=[run.settings for run in runs],
    )
    replace_text(Path(out_path), html)
    return [sentence for run in runs for sentence in run.damage]


def _shorten_names(runs: list[Run]) -> tuple[str, list[Run]]:
    common, names = split_common_prefix([run.name for run in runs])
    return common, [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _x_axis(runs: Sequence[Run]) -> tuple[str, str]:
    """Key and label of the x axis. Runs of different batch sizes are compared by the number of clips."""
    return ("step", "step") if len(runs) == 1 else ("samples", "clips seen")


def _charts(runs: Sequence[Run]) -> list[str]:
    """Draw each chart for which any run has numbers."""
    x_key, x_label = _x_axis(runs)
    result = []
    for key, (title, y_label, smooth) in CHARTS.items():
        curves = [
            Curve(run.name, run.column(x_key), run.column(key), colour)
            for run, colour in zip(runs, run_colours(len(runs)), strict=True)
        ]
        if any(math.isfinite(value) for curve in curves for value in curve.y):
            result.append(draw_chart(Chart(title, x_label, y_label, curves, smooth)))
    return result


def _evaluation_section(runs: Sequence[Run]) -> EvaluationSection | None:
    if not any(run.evaluations for run in runs):
        return None
    palette = run_colours(len(runs))
    mean, *bins = fixed_set.charts_over_training(runs, palette, *_x_axis(runs))
    # The curves of a single run are its evaluations, which the page's legend does not list.
    by_sigma = [
        draw_chart(chart, legend=len(runs) == 1) for chart in fixed_set.charts_by_sigma(runs, palette)
    ]
    newest = [run.evaluations[-1] for run in runs if run.evaluations]
    return EvaluationSection(
        num_clips=newest[0]["clips"],
        num_sigmas=len(newest[0]["sigma"]),
        charts=[*by_sigma, draw_chart(mean)],
        charts_by_bin=draw_chart_grid(bins),
    )


def _facts(run: Run) -> dict[str, str]:
    """Key numbers of a run."""
    if not run.metrics:
        return {"steps": "0"}
    last = run.metrics[-1]
    rates = [rate for rate in run.column("clips_per_s") if math.isfinite(rate)]
    seconds = sum(value for value in run.column("step_s") if math.isfinite(value))
    facts = {"steps": f"{last['step']:,}"}
    if samples := last.get("samples"):
        facts["clips seen"] = f"{samples:,}"
    facts["loss, smoothed"] = f"{smoothed(run.column('loss'))[-1]:.4f}"
    if run.evaluations:
        facts["loss on the fixed set"] = f"{statistics.fmean(run.evaluations[-1]['loss_average']):.4f}"
    if skipped := last.get("skipped"):
        facts["steps skipped"] = f"{skipped:,}"
    if faults := last.get("hardware_faults"):
        facts["steps with hardware faults"] = f"{faults:,}"
    if rates:
        facts["clips per second, median"] = f"{statistics.median(rates):.3g}"
    if seconds:
        facts["time in steps"] = _duration(seconds)
    return facts


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Setting -> its value in every run, for settings that differ."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = {key: [run.settings.get(key, "—") for run in runs] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _shown_steps(runs: Sequence[Run]) -> list[int]:
    """Sampled steps that are shown, newest first."""
    steps = sorted({step for run in runs for step in run.sample_folders}, reverse=True)
    max_steps = MAX_SAMPLED_STEPS if len(runs) == 1 else MAX_COMPARED_STEPS
    if len(steps) <= max_steps:
        return steps
    return [steps[round(i * (len(steps) - 1) / (max_steps - 1))] for i in range(max_steps)]


def _samples(run: Run, steps: Sequence[int]) -> dict[int, SampleSection]:
    samples = {}
    for step in steps:
        if (folder := run.sample_folders.get(step)) is not None:
            sheet = folder / "contact_sheet.png"
            videos = {path.stem: _base64(path, MP4_SIGNATURE) for path in sorted(folder.glob("*.mp4"))}
            measures = folder / "measures.json"
            measured = read_json(measures) if measures.is_file() else {}
            samples[step] = SampleSection(
                sheet=_base64(sheet, PNG_SIGNATURE) if sheet.exists() else None,
                videos=videos,
                measured=_numbers(measures, measured),
            )
    return samples


def _numbers(path: Path, values: Any) -> dict[str, float]:
    if not isinstance(values, dict) or not all(map(is_number, values.values())):
        raise ValueError(f"{path} is damaged: it must map names to numbers")
    return values


def _video_names(samples: Sequence[dict[int, SampleSection]], step: int) -> list[str]:
    """Names of the videos that any run has at a step; the same name is the same clip in all runs."""
    return sorted({name for by_step in samples if step in by_step for name in by_step[step].videos})


def _base64(path: Path, signature: tuple[int, bytes]) -> str:
    """Read a picture or video as base64.

    Raises:
        ValueError: the file has another type, for example because it is a link to a private file: reports are
            shared.
    """
    content = read_regular(path, MAX_MEDIA)
    begin, expected = signature
    if content[begin : begin + len(expected)] != expected:
        raise ValueError(f"{path} is not a {path.suffix.removeprefix('.').upper()} file")
    return base64.b64encode(content).decode("ascii")
