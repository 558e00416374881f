"""Which model people prefer: Elo ratings of pairwise votes, as arXiv 2311.15127 section E.3 rates its models.

Every model begins at 1000; a vote moves both of its models by K = 1 times what it surprises by, with the
logistic curve of base 10 and divisor 400. Ratings depend on the order of the votes, so they are averaged
over bootstrap samples of them, drawn with replacement in random order; their spread is the interval.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

START = 1000.0
K = 1.0
DIVISOR = 400.0
NUM_BOOTSTRAPS = 1000
INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstraps."""
COLUMNS = ("first", "second", "winner")
TIE = "tie"
ALL = "all"


@dataclass(frozen=True)
class Vote:
    """One person's choice between two models' videos for one prompt."""

    first: str
    second: str
    share: float
    """The first's: 1 it won, 0 it lost, 0.5 a tie."""
    axis: str = ALL
    """What was asked: quality, prompt following, ..."""


@dataclass(frozen=True)
class Rating:
    model: str
    elo: float
    """Mean over the bootstraps."""
    low: float
    high: float
    num_votes: int


def expected(rating: float | np.ndarray, other: float | np.ndarray) -> float | np.ndarray:
    """The share of votes that a model of `rating` should win against one of rating `other`."""
    return 1.0 / (1.0 + 10.0 ** ((other - rating) / DIVISOR))


def read_votes(path: Path) -> list[Vote]:
    """Votes of a csv with the columns first, second, winner, and axis where there are several questions.

    `winner` names one of the two models, or is "tie". Raises FileNotFoundError, or ValueError with the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there are no votes {path}")
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        table = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (table.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} lacks the column {missing[0]!r}; it has {table.fieldnames}")
        votes = []
        for row in table:
            first, second, winner = ((row[name] or "").strip() for name in COLUMNS)
            if first == second or winner not in (first, second, TIE):
                raise ValueError(
                    f"line {table.line_num} of {path} lets {winner!r} win between {first!r} and {second!r}"
                )
            share = 0.5 if winner == TIE else float(winner == first)
            votes.append(Vote(first, second, share, (row.get("axis") or ALL).strip()))
    if not votes:
        raise ValueError(f"{path} holds no votes")
    return votes


def rate(votes: Sequence[Vote], num_bootstraps: int = NUM_BOOTSTRAPS, seed: int = 0) -> list[Rating]:
    """Ratings of all models in `votes`, the best first."""
    models = sorted({model for vote in votes for model in (vote.first, vote.second)})
    number = {model: place for place, model in enumerate(models)}
    firsts = np.array([number[vote.first] for vote in votes])
    seconds = np.array([number[vote.second] for vote in votes])
    shares = np.array([vote.share for vote in votes])

    drawn = np.random.default_rng(seed).integers(len(votes), size=(len(votes), num_bootstraps))
    ratings = np.full((num_bootstraps, len(models)), START)
    each = np.arange(num_bootstraps)
    for of_each in drawn:
        first, second = firsts[of_each], seconds[of_each]
        surprise = shares[of_each] - expected(ratings[each, first], ratings[each, second])
        ratings[each, first] += K * surprise
        ratings[each, second] -= K * surprise

    lows, highs = np.percentile(ratings, INTERVAL, axis=0)
    counts = np.bincount(np.concatenate([firsts, seconds]), minlength=len(models))
    rated = [
        Rating(model, float(mean), float(low), float(high), int(count))
        for model, mean, low, high, count in zip(
            models, ratings.mean(axis=0), lows, highs, counts, strict=True
        )
    ]
    return sorted(rated, key=lambda rating: -rating.elo)
