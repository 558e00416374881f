"""Charts as SVG elements with the colours and the font of the page that contains them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = (
    "#3b7dd8", "#d9822b", "#2f9e77", "#c9453f", "#8b6fe0", "#a98b2d",
    "#c2549f", "#27a3b8", "#8a8f98", "#7fa63a", "#a4653d", "#5b6cc4",
)  # fmt: skip
"""Colours of the runs, in order; legible on white and on black."""
RAMP = ("#b9cdea", "#94b5e2", "#6e9cdb", "#4a83d3", "#2f68b6", "#1f4a88")
"""Colours of one run's evaluations, from the oldest to the newest."""
INK, RULE = "#010203", "#040506"
"""Placeholder colours that `_svg` replaces by the page's own."""
MAX_POINTS = 1000
"""Maximum number of points of a chart, over all curves: keeps the page small."""
LOG_RATIO = 20.0
"""Ratio of the highest to the lowest value above which the y axis is logarithmic."""
NUM_BINS = 40
"""Number of bins of a histogram."""
COLUMNS = 5
"""Number of small charts in a row."""


@dataclass(frozen=True)
class Curve:
    """One labelled line of a chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str


@dataclass(frozen=True)
class Chart:
    """One set of axes."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    smooth: bool = False
    """Draw smoothed lines; a single curve also shows its raw values as points."""
    log_x: bool = False
    marked: bool = False
    """Mark each value, for curves of few values."""


def run_colours(num: int) -> list[str]:
    """Return a colour for each of `num` runs."""
    return [COLOURS[i % len(COLOURS)] for i in range(num)]


def colour_ramp(num: int) -> list[str]:
    """Return `num` shades of one colour, from light to dark."""
    return [RAMP[-1 - round((num - 1 - i) * (len(RAMP) - 1) / max(1, num - 1))] for i in range(num)]


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Compute an exponential moving average over about 1/40 of the curve, at least 10 values.

    The average is corrected for its zero start; values that are not finite are skipped.
    """
    decay = 1 / max(10, len(values) / 40)
    total, weight, result = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total += decay * (value - total)
            weight += decay * (1 - weight)
        result.append(total / weight if weight else math.nan)
    return np.array(result)


def draw_chart(chart: Chart, legend: bool = False) -> str:
    """Draw a chart as an <svg> element, with a legend next to it on request."""
    with _style(chart.title):
        figure = Figure(figsize=(6.4, 2.9), layout="constrained")
        axes = figure.subplots()
        _fill(axes, chart, line_width=1.6)
        _label(axes, chart.title, chart.x_label, chart.y_label)
        if legend:
            figure.legend(loc="outside right upper", frameon=False, labelcolor=INK)
        return _svg(figure)


def draw_chart_grid(charts: Sequence[Chart]) -> str:
    """Draw several small charts with a common x axis, in rows, as one <svg> element."""
    num_rows = -(-len(charts) // COLUMNS)
    with _style(charts[0].title):
        figure = Figure(figsize=(13.2, 0.35 + 1.75 * num_rows), layout="constrained")
        grid = figure.subplots(num_rows, COLUMNS, squeeze=False)
        for axes, chart in zip(grid.flat, charts, strict=False):
            _fill(axes, chart, line_width=1.3)
            axes.set_title(chart.title, loc="left", color=INK, fontsize=9)
        for axes in grid.flat[len(charts) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel(charts[0].y_label, color=INK)
        for axes in grid[-1]:
            axes.set_xlabel(charts[0].x_label, color=INK)
        return _svg(figure)


def draw_histogram(title: str, x_label: str, parts: Sequence[tuple[str, Sequence[float], str]]) -> str:
    """Draw a stacked histogram as an <svg> element.

    Args:
        title: title of the chart.
        x_label: label of the x axis.
        parts: (label, values, colour) of each stacked set.
    """
    with _style(title):
        figure = Figure(figsize=(6.4, 2.9), layout="constrained")
        axes = figure.subplots()
        labels, values, palette = zip(*parts, strict=True)
        axes.hist(values, bins=NUM_BINS, stacked=True, label=labels, color=palette)
        _label(axes, title, x_label, "clips")
        _frame(axes)
        axes.set_axisbelow(True)
        figure.legend(loc="outside right upper", frameon=False, labelcolor=INK)
        return _svg(figure)


def _label(axes: Any, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)


def _frame(axes: Any) -> None:
    axes.grid(color=RULE, linewidth=0.6)
    axes.tick_params(which="both", color=RULE, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)


def _style(salt: str) -> Any:
    # Text stays text, dollar signs too, and ids differ between the charts of a page.
    options: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9}
    options["text.parse_math"] = False
    return matplotlib.rc_context(options)


def _fill(axes: Any, chart: Chart, line_width: float) -> None:
    lines = [smoothed(curve.y) if chart.smooth else np.array(curve.y, float) for curve in chart.curves]
    max_points = max(50, MAX_POINTS // max(1, len(lines)))
    for curve, line in zip(chart.curves, lines, strict=True):
        shown = slice(None, None, max(1, math.ceil(len(line) / max_points)))
        if chart.smooth and len(lines) == 1:
            axes.plot(
                curve.x[shown], curve.y[shown], ".", color=curve.colour, alpha=0.35, markersize=3.2, mew=0
            )
        mark = "o" if chart.marked or len(line) == 1 else None
        axes.plot(
            curve.x[shown], line[shown], color=curve.colour, label=curve.label,
            linewidth=line_width, marker=mark, markersize=3,
        )  # fmt: skip
    if chart.log_x:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    if _wants_log(lines):
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 5), useOffset=False)
        axes.yaxis.get_offset_text().set_color(INK)
    _frame(axes)


def _wants_log(lines: Sequence[np.ndarray]) -> bool:
    values = np.concatenate([line[np.isfinite(line)] for line in lines])
    return len(values) > 0 and values.min() > 0 and values.max() > LOG_RATIO * values.min()


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]  # without the XML header, which is invalid inside HTML
    return svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")
