"""What runs learned at each noise level, from their evaluations on one fixed set: charts, and a ranking."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from svd_ds.evaluation.charts import Chart, Curve, ramp
from svd_ds.evaluation.runs import Row, Run

MAX_EVALUATIONS = 6
"""Of one run, shown above each other."""
LOW, HIGH = 0.1, 10.0
"""Sigmas that part low, middle and high noise. On latents of deviation 1: below, noise is hardly seen and the
network learns detail; above, little else is seen and it learns what the conditions say."""
SIGMA = "noise level \N{GREEK SMALL LETTER SIGMA}"
ERROR = "squared error of v"


@dataclass(frozen=True)
class Place:
    """A run in the ranking. Losses are those of the averaged weights."""

    run: int
    """Its number among the runs of the report."""
    step: int
    samples: int
    loss: float
    """The mean over the noise levels."""
    above_best: float
    """By what share it is above the lowest."""
    low: float
    middle: float
    high: float
    raw: float
    """The mean loss of the weights themselves."""


@dataclass(frozen=True)
class Ranking:
    places: list[Place]
    """Lowest loss first."""
    best: dict[str, float]
    """Column -> its lowest number."""
    sentence: str


def by_sigma(runs: Sequence[Run], palette: Sequence[str]) -> list[Chart]:
    """Loss and gradient by sigma and by frame: each run's newest, or one run's over time."""
    shown = _shown(runs, palette)

    def by_level(key: str) -> list[Curve]:
        return [Curve(label, row["sigma"], row[key], colour) for label, row, colour in shown]

    def by_frame(key: str) -> list[Curve]:
        return [Curve(label, list(range(len(row[key]))), row[key], colour) for label, row, colour in shown]

    losses, norms = by_level("loss_average"), by_level("grad_norm")
    frame_losses, frame_norms = by_frame("loss_by_frame"), by_frame("grad_norm_by_frame")
    charts = [
        Chart("Loss by noise level (averaged weights)", SIGMA, ERROR, losses, log_x=True, marked=True),
        Chart("Gradient norm by noise level", SIGMA, "norm", norms, log_x=True, marked=True),
        Chart("Loss by frame, mean over noise levels", "frame", ERROR, frame_losses, marked=True),
        Chart("Gradient norm by frame, over all noise levels", "frame", "norm", frame_norms, marked=True),
    ]
    return [chart for chart in charts if any(curve.y for curve in chart.curves)]


def over_time(runs: Sequence[Run], palette: Sequence[str], x_key: str, x_label: str) -> list[Chart]:
    """The mean loss over training, then that of each bin of sigma."""

    def chart(title: str, s: int | None) -> Chart:
        curves = [
            Curve(
                run.name,
                [row[x_key] for row in run.evaluations],
                [fmean(row["loss"]) if s is None else row["loss"][s] for row in run.evaluations],
                colour,
            )
            for run, colour in zip(runs, palette, strict=True)
            if run.evaluations
        ]
        return Chart(title, x_label, ERROR, curves, marked=True)

    sigmas = next(run for run in runs if run.evaluations).evaluations[-1]["sigma"]
    bins = [chart(f"{SIGMA} ≈ {_digits(sigma)}", s) for s, sigma in enumerate(sigmas)]
    return [chart("Loss on the fixed set, mean over noise levels", None), *bins]


def rank(runs: Sequence[Run]) -> Ranking | None:
    """The runs that were measured on one set, by their newest loss; None where there are no two: see
    `why_unranked`."""
    newest = {number: run.evaluations[-1] for number, run in enumerate(runs) if run.evaluations}
    sets = [row["set"] for row in newest.values()]
    common = max(sets, key=sets.count, default=None)
    rows = {number: row for number, row in newest.items() if row["set"] == common}
    if len(rows) < 2:
        return None
    lowest = min(fmean(row["loss_average"]) for row in rows.values())
    places = sorted((_place(number, row, lowest) for number, row in rows.items()), key=lambda p: p.loss)
    best = {
        key: min(getattr(place, key) for place in places) for key in ("loss", "low", "middle", "high", "raw")
    }
    return Ranking(places, best, _sentence(runs, places, len(runs) - len(rows)))


def why_unranked(runs: Sequence[Run]) -> str | None:
    """What to tell where `rank` finds no two runs that were measured alike; None where nobody expects it."""
    if sum(bool(run.evaluations) for run in runs) < 2:
        return None
    return (
        "Each of these runs was measured on a fixed set of its own, so there is no ranking: their evaluation "
        "clips, the shape of these, or the autoencoder differ."
    )


def _digits(value: float) -> str:
    """Two digits, never as a power of ten."""
    return np.format_float_positional(value, precision=2, fractional=False, trim="-")


def _place(number: int, row: Row, lowest: float) -> Place:
    losses = list(zip(row["sigma"], row["loss_average"], strict=True))
    loss = fmean(row["loss_average"])
    return Place(
        run=number,
        step=row["step"],
        samples=row["samples"],
        loss=loss,
        above_best=loss / lowest - 1,
        low=fmean(loss for sigma, loss in losses if sigma < LOW),
        middle=fmean(loss for sigma, loss in losses if LOW <= sigma <= HIGH),
        high=fmean(loss for sigma, loss in losses if sigma > HIGH),
        raw=fmean(row["loss"]),
    )


def _sentence(runs: Sequence[Run], places: Sequence[Place], left_out: int) -> str:
    first, second = places[:2]
    told = (
        f"{runs[first.run].name} has the lowest loss on the fixed set, {first.loss:.4f}; "
        f"{runs[second.run].name} follows {_digits(100 * second.above_best)} % above it."
    )
    if len({place.samples for place in places}) > 1:
        told += " The runs have not seen equally many clips: compare with care."
    if left_out:
        told += f" {left_out} of the runs {'was' if left_out == 1 else 'were'} not measured on this set."
    return told


def _shown(runs: Sequence[Run], palette: Sequence[str]) -> list[tuple[str, Row, str]]:
    """(label, evaluation, colour) of the curves by sigma."""
    if len(runs) > 1:
        return [
            (run.name, run.evaluations[-1], colour)
            for run, colour in zip(runs, palette, strict=True)
            if run.evaluations
        ]
    rows = runs[0].evaluations
    count = min(len(rows), MAX_EVALUATIONS)
    chosen = [rows[math.ceil((i + 1) * len(rows) / count) - 1] for i in range(count)]
    return [(f"step {row['step']:,}", row, colour) for row, colour in zip(chosen, ramp(count), strict=True)]
