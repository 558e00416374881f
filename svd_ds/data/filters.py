"""Filters on the numbers of a sample in the index: `motion>=q25`, `text_area<=0.07`.

A condition compares one number of the sample, a field of its index line or one of its annotations, with a
number, or with a quantile: q25 is the value that a quarter of the data set's samples are below. So the
filters of arXiv 2311.15127 section 3.3 ("drop the 25 % most static") are conditions, and training on a subset
needs no second copy of the shards. Quantiles are taken over the complete data set, whatever else is filtered:
each axis can be studied by itself, as in the paper. A sample that lacks the number is left out.
"""

from __future__ import annotations

import math
import operator
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from svd_ds.data.sample import NUMBERS, Sample
from svd_ds.data.shards import Index
from svd_ds.scalars import SAMPLE_FIELDS

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
GRAMMAR = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*(q?)([-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class Condition:
    """Comparison of a number of a sample with a number or a quantile."""

    name: str
    """Field of the index line, scalar or annotation."""
    comparison: str
    """Key of COMPARISONS."""
    value: float
    is_quantile: bool
    """True if `value` is a percentage of the data set's samples."""

    def __str__(self) -> str:
        return f"{self.name}{self.comparison}{'q' if self.is_quantile else ''}{self.value:g}"

    @staticmethod
    def parse(text: str, where: str = "data.where") -> Condition:
        """Parse NAME>=NUMBER or NAME>=qPERCENT (or <=, >, <).

        Args:
            text: the condition.
            where: config key or option that the text comes from, for error messages.

        Raises:
            ValueError: the text is not a condition.
        """
        match = GRAMMAR.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{where} has {text!r}, which is not a condition like motion>=q25 or text_area<=0.07"
            )
        name, comparison, quantile, number = match.groups()
        if not math.isfinite(float(number)):
            raise ValueError(f"{where} has {text!r}, whose number is not finite")
        if quantile and not 0 <= float(number) <= 100:
            raise ValueError(f"{where} has {text!r}, but a quantile lies between q0 and q100")
        return Condition(name, comparison, float(number), bool(quantile))

    def limit(self, numbers: Iterable[float | None]) -> float | None:
        """Compute the number that samples are compared with: the condition's own, or a quantile of `numbers`.

        Args:
            numbers: number of each sample; None and NaN are not counted.

        Returns:
            The limit; None if no sample has the number.
        """
        present = array("d", (number for number in numbers if number is not None and math.isfinite(number)))
        if not present:
            return None
        return float(np.quantile(present, self.value / 100)) if self.is_quantile else self.value

    def accepts(self, number: float | None, limit: float) -> bool:
        """Return True if a sample with that number meets the condition; False if it has none."""
        return number is not None and COMPARISONS[self.comparison](number, limit)


@dataclass(frozen=True)
class Selection:
    """Filter of an index's samples: those that meet all conditions."""

    limits: tuple[tuple[Condition, float], ...]
    """Each condition with its limit."""
    notes: tuple[str, ...]
    """Sentences, one for each number that some samples lack."""

    def __call__(self, sample: Sample) -> bool:
        return all(
            condition.accepts(sample.number(condition.name), limit) for condition, limit in self.limits
        )


def select_samples(conditions: Sequence[str], index: Index) -> Selection:
    """Build the filter of the samples of `index` that meet every condition.

    Raises:
        ValueError: a text is not a condition, or names a number that no sample has.
    """
    parsed = [Condition.parse(text) for text in conditions]
    numbers = {condition.name: array("d") for condition in parsed}
    fields = (*NUMBERS, *SAMPLE_FIELDS)
    annotations: set[str] = set()
    # The index is read once for all conditions. NaN marks a number that a sample lacks: an index has no NaN.
    for sample in index.samples() if parsed else ():
        annotations |= sample.annotations.keys()
        for name, values in numbers.items():
            number = sample.number(name)
            values.append(math.nan if number is None else number)
    limits, notes = [], []
    for condition in parsed:
        limit = condition.limit(numbers[condition.name])
        if limit is None:
            names = (*fields, *sorted(annotations - set(fields)))
            others = ", ".join(name for name in names if name != condition.name)
            raise ValueError(
                f"data.where asks for {condition.name}, which no sample in {index.folder} has; the samples "
                f"have {others}"
            )
        limits.append((condition, limit))
    for name, values in numbers.items():
        if lacking := int(np.isnan(values).sum()):
            notes.append(f"{lacking} of {len(index)} samples in {index.folder} lack {name} and are left out")
    return Selection(tuple(limits), tuple(notes))
