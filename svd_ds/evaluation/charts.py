"""Curves as SVG text that takes on the colours and the font of the page it stands in."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

COLOURS = ("#3b7dd8", "#d9822b", "#2f9e77", "#b4539c", "#c9453f", "#7a6ff0", "#8a8f98", "#a98b2d")
"""Of the runs, in order; legible on white and on black."""
INK, RULE = "#010203", "#040506"
"""Stand-ins that become the page's own colours in `_svg`."""
MAX_POINTS = 1000
"""Points drawn of a curve: the page stays small however long the run."""
LOG_RATIO = 20.0
"""Highest over lowest smoothed value from which the y axis is logarithmic."""


@dataclass(frozen=True)
class Curve:
    label: str
    x: Sequence[float]
    y: Sequence[float]


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Exponential moving average over about a fortieth of the curve, at least 10 values.

    Its start is corrected for bias; what is not a number is skipped.
    """
    rate = 1 / max(10, len(values) / 40)
    total, weight, result = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total += rate * (value - total)
            weight += rate * (1 - weight)
        result.append(total / weight if weight else math.nan)
    return np.array(result)


def chart(title: str, curves: Sequence[Curve], x_label: str, smooth: bool) -> str:
    """One set of axes as an <svg> element: with `smooth`, raw values as points under their smoothed line.

    A curve's colour is that of its place in `curves`; a single one has no legend.
    """
    # Text stays text, and ids differ between the charts of a page.
    options: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}
    with matplotlib.rc_context(options):
        figure = Figure(figsize=(6.4, 2.9), layout="constrained")
        axes = figure.subplots()
        lines = [smoothed(curve.y) if smooth else np.array(curve.y) for curve in curves]
        for curve, line, colour in zip(curves, lines, _cycle(len(curves)), strict=True):
            thin = slice(None, None, max(1, math.ceil(len(curve.x) / MAX_POINTS)))
            if smooth:
                axes.plot(curve.x[thin], curve.y[thin], ".", color=colour, alpha=0.35, markersize=3.2, mew=0)
            axes.plot(curve.x[thin], line[thin], color=colour, linewidth=1.6, label=curve.label)
        if _wants_log(lines):
            axes.set_yscale("log")
        else:
            axes.ticklabel_format(axis="y", scilimits=(-3, 5))
            axes.yaxis.get_offset_text().set_color(INK)
        if len(curves) > 1:
            axes.legend(frameon=False, labelcolor=INK)
        axes.set_title(title, loc="left", color=INK, fontsize=10)
        axes.set_xlabel(x_label, color=INK)
        axes.grid(color=RULE, linewidth=0.6)
        axes.tick_params(which="both", color=RULE, labelcolor=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(RULE)
        return _svg(figure)


def _wants_log(lines: Sequence[np.ndarray]) -> bool:
    values = np.concatenate([line[np.isfinite(line)] for line in lines])
    return len(values) > 0 and values.min() > 0 and values.max() > LOG_RATIO * values.min()


def _cycle(num: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(num)]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]  # an XML header has no place inside HTML
    return svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")
