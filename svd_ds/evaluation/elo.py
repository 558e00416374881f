"""Elo ratings from pairwise human votes, as in arXiv 2311.15127, section E.3.

Every model starts at 1000. A vote changes the ratings of its two models by K = 1 times the difference of
actual and expected score, with a logistic curve of base 10 and divisor 400. Ratings depend on the order of
the votes, so they are averaged over bootstrap samples of the votes, drawn with replacement in random order;
percentiles of the samples give the interval.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

INITIAL_RATING = 1000.0
K = 1.0
DIVISOR = 400.0
NUM_BOOTSTRAPS = 1000
INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap samples."""
COLUMNS = ("first", "second", "winner")
TIE = "tie"
DEFAULT_AXIS = "all"


@dataclass(frozen=True)
class Vote:
    """One person's choice between two models' videos for one prompt."""

    first: str
    second: str
    score: float
    """Score of the first model: 1 for a win, 0 for a loss, 0.5 for a tie."""
    axis: str = DEFAULT_AXIS
    """Question that was asked, such as quality or prompt following."""


@dataclass(frozen=True)
class Rating:
    """Elo rating of a model, with its interval."""

    model: str
    elo: float
    """Mean over the bootstrap samples."""
    low: float
    high: float
    num_votes: int


def expected_score(rating: float | np.ndarray, other: float | np.ndarray) -> float | np.ndarray:
    """Compute the expected score of a model against another, from their ratings."""
    return 1.0 / (1.0 + 10.0 ** ((other - rating) / DIVISOR))


def read_votes(path: Path) -> list[Vote]:
    """Read votes from a csv with the columns first, second, winner, and optionally axis.

    `winner` is the name of one of the two models, or "tie".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, a line is invalid, or there are no votes.
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
                    f"line {table.line_num} of {path} has the winner {winner!r}: "
                    f"it must be one of two different models, {first!r} or {second!r}, or {TIE!r}"
                )
            score = 0.5 if winner == TIE else float(winner == first)
            votes.append(Vote(first, second, score, (row.get("axis") or DEFAULT_AXIS).strip()))
    if not votes:
        raise ValueError(f"{path} holds no votes")
    return votes


def rate_models(votes: Sequence[Vote], num_bootstraps: int = NUM_BOOTSTRAPS, seed: int = 0) -> list[Rating]:
    """Rate all models in `votes`; the best comes first."""
    models = sorted({model for vote in votes for model in (vote.first, vote.second)})
    index = {model: i for i, model in enumerate(models)}
    firsts = np.array([index[vote.first] for vote in votes])
    seconds = np.array([index[vote.second] for vote in votes])
    scores = np.array([vote.score for vote in votes])

    drawn = np.random.default_rng(seed).integers(len(votes), size=(len(votes), num_bootstraps))
    ratings = np.full((num_bootstraps, len(models)), INITIAL_RATING)
    rows = np.arange(num_bootstraps)
    for vote_indices in drawn:
        first, second = firsts[vote_indices], seconds[vote_indices]
        error = scores[vote_indices] - expected_score(ratings[rows, first], ratings[rows, second])
        ratings[rows, first] += K * error
        ratings[rows, second] -= K * error

    lows, highs = np.percentile(ratings, INTERVAL, axis=0)
    counts = np.bincount(np.concatenate([firsts, seconds]), minlength=len(models))
    rated = [
        Rating(model, float(mean), float(low), float(high), int(count))
        for model, mean, low, high, count in zip(
            models, ratings.mean(axis=0), lows, highs, counts, strict=True
        )
    ]
    return sorted(rated, key=lambda rating: -rating.elo)
