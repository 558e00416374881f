"""A run, or several side by side, as one HTML file that needs nothing else.

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
from svd_ds.evaluation.charts import Chart, Curve, colours, draw, draw_small, smoothed
from svd_ds.evaluation.runs import Run, read_runs, short_names
from svd_ds.fsync_io import replace_text
from svd_ds.small_files import is_number, read_json, read_regular

MAX_SAMPLED_STEPS = 6
"""Sampled steps shown, evenly chosen, the newest always: videos make the file large."""
MAX_COMPARED_STEPS = 2
"""The same, of several runs."""
MAX_SHEETS = 3
"""Runs side by side that leave room for a sheet of frames each."""

MAX_MEDIA = 2**28
"""Bytes of a picture or a video."""
PNG_MARK, MP4_MARK = (0, b"\x89PNG\r\n\x1a\n"), (4, b"ftyp")
"""Where a file of this kind has which bytes."""

CHARTS = {
    "loss": ("Training loss", "weighted error", True),
    "reconstruction": ("Reconstruction", "mean absolute difference", True),
    "perceptual": ("Perceptual distance", "LPIPS", True),
    "adversarial": ("Adversarial term", "minus the score", True),
    "discriminator": ("Discriminator", "hinge loss", True),
    "grad_norm": ("Gradient norm before clipping", "norm", True),
    "lr": ("Learning rate", "rate", False),
    "clips_per_s": ("Throughput", "clips a second", True),
}
"""Key in metrics.jsonl, where a run has it -> title, label of the y axis, whether it is noisy enough to
smooth."""


@dataclass(frozen=True)
class Evaluated:
    """What the fixed set shows, as SVG."""

    clips: int
    num_sigmas: int
    charts: list[str]
    bins: str
    """Small charts, one a bin of sigma."""


@dataclass(frozen=True)
class Sample:
    """What was sampled at one step: base64 of the files, by name, and what was measured of them."""

    sheet: str | None
    videos: dict[str, str]
    measured: dict[str, float]


def write_report(run_dirs: Sequence[Path | str], out_path: Path | str) -> list[str]:
    """Write the report of one run, or of several compared, to `out_path`.

    Returns:
        A sentence for each damaged file of the runs, of which the report lacks what cannot be read.
    """
    if not run_dirs:
        raise ValueError("a report needs at least one run folder")
    common, runs = _shortened(read_runs([Path(path) for path in run_dirs]))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("svd_ds") / "assets" / "report.html.jinja").read_text())
    steps = _shown_steps(runs)
    facts = [_facts(run) for run in runs]
    samples = [_samples(run, steps) for run in runs]
    several = f"{common}: {len(runs)} runs" if common else f"{len(runs)} runs side by side"
    html = template.render(
        title=runs[0].name if len(runs) == 1 else several,
        names=[run.name for run in runs],
        colours=colours(len(runs)),
        facts=facts,
        fact_names=list(dict.fromkeys(name for of_run in facts for name in of_run)),
        ranking=fixed_set.rank(runs),
        why_unranked=fixed_set.why_unranked(runs),
        low=fixed_set.LOW,
        high=fixed_set.HIGH,
        evaluated=_evaluated(runs),
        charts=_charts(runs),
        steps=steps,
        samples=samples,
        clips={step: _clips(samples, step) for step in steps},
        with_sheets=len(runs) <= MAX_SHEETS,
        differing=_differing(runs),
        settings=[run.settings for run in runs],
    )
    replace_text(Path(out_path), html)
    return [sentence for run in runs for sentence in run.damage]


def _shortened(runs: list[Run]) -> tuple[str, list[Run]]:
    common, names = short_names([run.name for run in runs])
    return common, [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _x_axis(runs: Sequence[Run]) -> tuple[str, str]:
    """Key and label. Runs of different batch size meet only on the count of clips."""
    return ("step", "step") if len(runs) == 1 else ("samples", "clips seen")


def _charts(runs: Sequence[Run]) -> list[str]:
    """SVG of each chart for which any run has numbers."""
    x_key, x_label = _x_axis(runs)
    result = []
    for key, (title, y_label, smooth) in CHARTS.items():
        curves = [
            Curve(run.name, run.column(x_key), run.column(key), colour)
            for run, colour in zip(runs, colours(len(runs)), strict=True)
        ]
        if any(math.isfinite(value) for curve in curves for value in curve.y):
            result.append(draw(Chart(title, x_label, y_label, curves, smooth)))
    return result


def _evaluated(runs: Sequence[Run]) -> Evaluated | None:
    if not any(run.evaluations for run in runs):
        return None
    palette = colours(len(runs))
    mean, *bins = fixed_set.over_time(runs, palette, *_x_axis(runs))
    # Of one run the curves are its evaluations, which the page's legend does not name.
    by_sigma = [draw(chart, legend=len(runs) == 1) for chart in fixed_set.by_sigma(runs, palette)]
    newest = [run.evaluations[-1] for run in runs if run.evaluations]
    return Evaluated(
        clips=newest[0]["clips"],
        num_sigmas=len(newest[0]["sigma"]),
        charts=[*by_sigma, draw(mean)],
        bins=draw_small(bins),
    )


def _facts(run: Run) -> dict[str, str]:
    """The numbers that one asks for first."""
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
        facts["steps computed wrongly by failing hardware"] = f"{faults:,}"
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
    most = MAX_SAMPLED_STEPS if len(runs) == 1 else MAX_COMPARED_STEPS
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _samples(run: Run, steps: Sequence[int]) -> dict[int, Sample]:
    samples = {}
    for step in steps:
        if (folder := run.sample_folders.get(step)) is not None:
            sheet = folder / "contact_sheet.png"
            videos = {path.stem: _base64(path, MP4_MARK) for path in sorted(folder.glob("*.mp4"))}
            measures = folder / "measures.json"
            measured = read_json(measures) if measures.is_file() else {}
            samples[step] = Sample(
                sheet=_base64(sheet, PNG_MARK) if sheet.exists() else None,
                videos=videos,
                measured=_numbers(measures, measured),
            )
    return samples


def _numbers(path: Path, values: Any) -> dict[str, float]:
    if not isinstance(values, dict) or not all(map(is_number, values.values())):
        raise ValueError(f"{path} is damaged: it must hold numbers by name")
    return values


def _clips(samples: Sequence[dict[int, Sample]], step: int) -> list[str]:
    """Names of the videos that any run has at a step: one name is one clip in all of them."""
    return sorted({name for of_run in samples if step in of_run for name in of_run[step].videos})


def _base64(path: Path, mark: tuple[int, bytes]) -> str:
    """A picture or video in base64.

    Raises:
        ValueError: it is another file, as where it is a link to one: a report is handed on.
    """
    content = read_regular(path, MAX_MEDIA)
    begin, expected = mark
    if content[begin : begin + len(expected)] != expected:
        raise ValueError(f"{path} is no {path.suffix.removeprefix('.').upper()} file")
    return base64.b64encode(content).decode("ascii")
