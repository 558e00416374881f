"""Conditions on what the index says of a sample: `motion>=q25`, `text_area<=0.07`.

A condition compares one number of the sample, which is a field of its index line or one of its annotations,
with a number, or with a quantile: q25 is the value that a quarter of the data set's samples lie below. So
the filters of arXiv 2311.15127 section 3.3 ("drop the 25 % most static") are conditions, and a training on a
subset needs no second copy of the shards. Quantiles are those of the whole data set, whatever else is
filtered: each axis can be studied by itself, as the paper does.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from svd_ds.data.shards import Index, Sample

FIELDS = ("motion", "num_frames", "fps", "height", "width", "elevation")
"""What every index line may be asked for, beside the annotations that its data set has."""
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
GRAMMAR = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*(q?)([-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class Condition:
    """One comparison."""

    name: str
    comparison: str
    value: float
    is_quantile: bool
    """`value` is a percentage of the data set's samples."""

    def __str__(self) -> str:
        return f"{self.name}{self.comparison}{'q' if self.is_quantile else ''}{self.value:g}"

    @staticmethod
    def parse(text: str, where: str = "data.where") -> Condition:
        """Read NAME>=NUMBER or NAME>=qPERCENT (or <=, >, <); ValueError, with `where`, for anything else."""
        match = GRAMMAR.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{where} has {text!r}, which is no condition like motion>=q25 or text_area<=0.07"
            )
        name, comparison, quantile, number = match.groups()
        if quantile and not 0 <= float(number) <= 100:
            raise ValueError(f"{where} has {text!r}, but a quantile lies between q0 and q100")
        return Condition(name, comparison, float(number), bool(quantile))


def number_of(sample: Sample, name: str) -> float:
    """A sample's field or annotation. Raises ValueError, naming the sample, where it has none."""
    value = getattr(sample, name) if name in FIELDS else sample.annotations.get(name)
    if value is None:
        known = [field for field in FIELDS if field != name] + sorted(sample.annotations)
        raise ValueError(
            f"data.where asks for {name}, which sample {sample.id} lacks; it has {', '.join(known)}"
        )
    return float(value)


def satisfies(conditions: Sequence[str], index: Index) -> Callable[[Sample], bool]:
    """Does a sample of `index` meet every condition? Raises ValueError as `Condition` and `number_of` do."""
    parsed = [Condition.parse(text) for text in conditions]
    limits = _limits(parsed, index)
    tests = [(c.name, COMPARISONS[c.comparison], limit) for c, limit in zip(parsed, limits, strict=True)]
    return lambda sample: all(compare(number_of(sample, name), limit) for name, compare, limit in tests)


def _limits(conditions: Sequence[Condition], index: Index) -> list[float]:
    """The number that each condition compares with; the index is read once for all quantiles."""
    names = sorted({condition.name for condition in conditions if condition.is_quantile})
    numbers: dict[str, list[float]] = {name: [] for name in names}
    for sample in index.samples() if names else ():
        for name in names:
            numbers[name].append(number_of(sample, name))
    return [
        float(np.quantile(numbers[c.name], c.value / 100)) if c.is_quantile else c.value for c in conditions
    ]
