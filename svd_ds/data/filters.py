"""Conditions on what the index says of a sample: `motion>=q25`, `text_area<=0.07`.

A condition compares one number of the sample, which is a field of its index line or one of its annotations,
with a number, or with a quantile: q25 is the value that a quarter of the data set's samples lie below. So
the filters of arXiv 2311.15127 section 3.3 ("drop the 25 % most static") are conditions, and a training on a
subset needs no second copy of the shards. Quantiles are those of the whole data set, whatever else is
filtered: each axis can be studied by itself, as the paper does. A sample that lacks the number is left out.
"""

from __future__ import annotations

import math
import operator
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from svd_ds.data.sample import Sample
from svd_ds.data.shards import Index

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
        if not math.isfinite(float(number)):
            raise ValueError(f"{where} has {text!r}, whose number is not finite")
        if quantile and not 0 <= float(number) <= 100:
            raise ValueError(f"{where} has {text!r}, but a quantile lies between q0 and q100")
        return Condition(name, comparison, float(number), bool(quantile))

    def limit(self, numbers: Iterable[float | None]) -> float | None:
        """What the condition compares with: its number, or its quantile of the samples that have one.

        None where none of them has one. A sample without the number, or with NaN, is left out, and not
        counted: tools/curate.py and data.where agree on that.
        """
        known = array("d", (number for number in numbers if number is not None and math.isfinite(number)))
        if not known:
            return None
        return float(np.quantile(known, self.value / 100)) if self.is_quantile else self.value

    def accepts(self, number: float | None, limit: float) -> bool:
        """Whether a sample with that number meets the condition; one without it does not."""
        return number is not None and COMPARISONS[self.comparison](number, limit)


@dataclass(frozen=True)
class Selection:
    """Which samples of an index meet all of some conditions."""

    limits: tuple[tuple[Condition, float], ...]
    notes: tuple[str, ...]
    """One sentence for each number that some samples lack."""

    def __call__(self, sample: Sample) -> bool:
        return all(
            condition.accepts(number_of(sample, condition.name), limit) for condition, limit in self.limits
        )


def number_of(sample: Sample, name: str) -> float | None:
    """A sample's field or annotation; None where it has none."""
    return getattr(sample, name) if name in FIELDS else sample.annotations.get(name)


def satisfies(conditions: Sequence[str], index: Index) -> Selection:
    """The samples of `index` that meet every condition.

    Raises:
        ValueError: a text is no condition, or names a number that no sample has.
    """
    parsed = [Condition.parse(text) for text in conditions]
    numbers = {condition.name: array("d") for condition in parsed}
    known = set(FIELDS)
    # The index is read once for all conditions. NaN is what a sample lacks: no number of an index is NaN.
    for sample in index.samples() if parsed else ():
        known |= sample.annotations.keys()
        for name, values in numbers.items():
            number = number_of(sample, name)
            values.append(math.nan if number is None else number)
    limits, notes = [], []
    for condition in parsed:
        limit = condition.limit(numbers[condition.name])
        if limit is None:
            others = ", ".join(
                name for name in (*FIELDS, *sorted(known - set(FIELDS))) if name != condition.name
            )
            raise ValueError(
                f"data.where asks for {condition.name}, which no sample in {index.folder} has; they have "
                f"{others}"
            )
        limits.append((condition, limit))
    for name, values in numbers.items():
        if lacking := int(np.isnan(values).sum()):
            notes.append(f"{lacking} of {len(index)} samples in {index.folder} lack {name} and are left out")
    return Selection(tuple(limits), tuple(notes))
