"""Evaluations of runs on one fixed set: charts of loss and gradient by noise level, and a ranking."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from svd_ds.evaluation.charts import Chart, Curve, colour_ramp
from svd_ds.evaluation.runs import Row, Run

MAX_EVALUATIONS = 6
"""Maximum number of evaluations of one run that are drawn into one chart."""
LOW_SIGMA, HIGH_SIGMA = 0.1, 10.0
"""Sigmas that separate low, middle and high noise, for latents of standard deviation 1. At low noise the
network learns detail; at high noise the content comes from the conditioning."""
SIGMA = "noise level \N{GREEK SMALL LETTER SIGMA}"
ERROR = "squared error of v"


@dataclass(frozen=True)
class RankedRun:
    """A run in the ranking. Losses are those of the averaged weights."""

    run_index: int
    """Index of the run among the runs of the report."""
    step: int
    samples: int
    loss: float
    """Mean over all noise levels."""
    above_best: float
    """Relative distance to the lowest loss."""
    low: float
    """Mean over the noise levels below LOW_SIGMA."""
    middle: float
    high: float
    """Mean over the noise levels above HIGH_SIGMA."""
    raw: float
    """Mean loss of the raw weights."""


@dataclass(frozen=True)
class Ranking:
    """Ranking of the runs that were evaluated on one fixed set."""

    entries: list[RankedRun]
    """Runs by ascending loss."""
    best: dict[str, float]
    """Column -> its lowest number."""
    sentence: str
    """Summary in words."""


def charts_by_sigma(runs: Sequence[Run], palette: Sequence[str]) -> list[Chart]:
    """Make charts of loss and gradient by sigma and by frame.

    They show the newest evaluation of each run, or several evaluations of a single run.
    """
    shown = _shown_evaluations(runs, palette)

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


def charts_over_training(
    runs: Sequence[Run], palette: Sequence[str], x_key: str, x_label: str
) -> list[Chart]:
    """Make a chart of the mean loss over training, then one of the loss in each bin of sigma."""

    def chart(title: str, bin_index: int | None) -> Chart:
        curves = [
            Curve(
                run.name,
                [row[x_key] for row in run.evaluations],
                [
                    fmean(row["loss"]) if bin_index is None else row["loss"][bin_index]
                    for row in run.evaluations
                ],
                colour,
            )
            for run, colour in zip(runs, palette, strict=True)
            if run.evaluations
        ]
        return Chart(title, x_label, ERROR, curves, marked=True)

    sigmas = next(run for run in runs if run.evaluations).evaluations[-1]["sigma"]
    bins = [chart(f"{SIGMA} ≈ {_format_two_digits(sigma)}", i) for i, sigma in enumerate(sigmas)]
    return [chart("Loss on the fixed set, mean over noise levels", None), *bins]


def rank_runs(runs: Sequence[Run]) -> Ranking | None:
    """Rank the runs that were evaluated on one fixed set by their newest loss.

    Returns:
        The ranking; None if fewer than two runs share a set, see `explain_missing_ranking`.
    """
    newest = {i: run.evaluations[-1] for i, run in enumerate(runs) if run.evaluations}
    sets = [row["set"] for row in newest.values()]
    common = max(sets, key=sets.count, default=None)
    rows = {i: row for i, row in newest.items() if row["set"] == common}
    if len(rows) < 2:
        return None
    lowest = min(fmean(row["loss_average"]) for row in rows.values())
    entries = sorted((_rank_entry(i, row, lowest) for i, row in rows.items()), key=lambda entry: entry.loss)
    best = {
        key: min(getattr(entry, key) for entry in entries) for key in ("loss", "low", "middle", "high", "raw")
    }
    return Ranking(entries, best, _summary(runs, entries, len(runs) - len(rows)))


def explain_missing_ranking(runs: Sequence[Run]) -> str | None:
    """Explain to the user why several evaluated runs have no ranking; None if fewer than two were
    evaluated."""
    if sum(bool(run.evaluations) for run in runs) < 2:
        return None
    return (
        "The runs were evaluated on different fixed sets, so there is no ranking: their evaluation clips, "
        "frame sizes, numbers of frames or autoencoders differ."
    )


def _format_two_digits(value: float) -> str:
    """Format with two significant digits, never as a power of ten."""
    return np.format_float_positional(value, precision=2, fractional=False, trim="-")


def _rank_entry(index: int, row: Row, lowest: float) -> RankedRun:
    losses = list(zip(row["sigma"], row["loss_average"], strict=True))
    loss = fmean(row["loss_average"])
    return RankedRun(
        run_index=index,
        step=row["step"],
        samples=row["samples"],
        loss=loss,
        above_best=loss / lowest - 1,
        low=fmean(loss for sigma, loss in losses if sigma < LOW_SIGMA),
        middle=fmean(loss for sigma, loss in losses if LOW_SIGMA <= sigma <= HIGH_SIGMA),
        high=fmean(loss for sigma, loss in losses if sigma > HIGH_SIGMA),
        raw=fmean(row["loss"]),
    )


def _summary(runs: Sequence[Run], entries: Sequence[RankedRun], num_unranked: int) -> str:
    first, second = entries[:2]
    text = (
        f"{runs[first.run_index].name} has the lowest loss on the fixed set, {first.loss:.4f}; "
        f"{runs[second.run_index].name} follows, {_format_two_digits(100 * second.above_best)} % higher."
    )
    if len({entry.samples for entry in entries}) > 1:
        text += " The runs have seen different numbers of clips: compare with care."
    if num_unranked:
        text += (
            f" {num_unranked} of the runs {'was' if num_unranked == 1 else 'were'} not measured on this set."
        )
    return text


def _shown_evaluations(runs: Sequence[Run], palette: Sequence[str]) -> list[tuple[str, Row, str]]:
    """Return (label, evaluation, colour) of the curves by sigma."""
    if len(runs) > 1:
        return [
            (run.name, run.evaluations[-1], colour)
            for run, colour in zip(runs, palette, strict=True)
            if run.evaluations
        ]
    rows = runs[0].evaluations
    count = min(len(rows), MAX_EVALUATIONS)
    shown = [rows[math.ceil((i + 1) * len(rows) / count) - 1] for i in range(count)]
    return [
        (f"step {row['step']:,}", row, colour) for row, colour in zip(shown, colour_ramp(count), strict=True)
    ]
