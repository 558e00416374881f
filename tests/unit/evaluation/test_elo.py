"""Elo ratings: one vote, known preferences, intervals, bad files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from svd_ds.evaluation.elo import Vote, expected_score, rate_models, read_votes


def simulate_votes(strengths: dict[str, float], num_votes: int) -> list[Vote]:
    """Votes of people whose preferences follow the logistic curve."""
    generator = np.random.default_rng(0)
    votes = []
    for _ in range(num_votes):
        first, second = generator.choice(list(strengths), 2, replace=False)
        wins = generator.random() < expected_score(strengths[first], strengths[second])
        votes.append(Vote(str(first), str(second), float(wins)))
    return votes


def test_ratings_of_one_vote() -> None:
    best, worst = rate_models([Vote("a", "b", 1.0)])
    assert (best.model, best.elo, best.low, best.high, best.num_votes) == ("a", 1000.5, 1000.5, 1000.5, 1)
    assert (worst.model, worst.elo) == ("b", 999.5)
    assert rate_models([Vote("a", "b", 0.5)])[0].elo == 1000.0
    assert expected_score(1400.0, 1000.0) == pytest.approx(10 / 11)


def test_known_preferences_are_ranked_with_separate_intervals() -> None:
    strengths = {"weak": 900.0, "middle": 1000.0, "strong": 1100.0}
    few, many = rate_models(simulate_votes(strengths, 300)), rate_models(simulate_votes(strengths, 3000))
    assert [rating.model for rating in many] == ["strong", "middle", "weak"]
    assert all(rating.low < rating.elo < rating.high for rating in many)
    assert many[0].low > many[1].high and many[1].low > many[2].high
    assert sum(rating.elo for rating in many) == pytest.approx(3000)
    assert sum(rating.num_votes for rating in few) == 600
    # With K = 1 the ratings approach the true distance from below.
    assert 100 < many[0].elo - many[2].elo < 220


def test_intervals_of_equal_models_overlap() -> None:
    best, worst = rate_models(simulate_votes({"a": 1000.0, "b": 1000.0}, 500))
    assert worst.high > best.low
    assert rate_models(simulate_votes({"a": 1000.0, "b": 1000.0}, 500)) == [best, worst], (
        "the seed fixes the bootstraps"
    )


def test_votes_are_read_from_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "votes.csv"
    path.write_text("prompt,first,second,winner,axis\n1,a,b,b,quality\n2,b,a,tie,prompt\n")
    assert read_votes(path) == [Vote("a", "b", 0.0, "quality"), Vote("b", "a", 0.5, "prompt")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("first,second\na,b\n", "lacks the column 'winner'"),
        (
            "first,second,winner\na,b,c\n",
            "line 2 of .* has the winner 'c': it must be one of two different models, 'a' or 'b'",
        ),
        ("first,second,winner\na,a,a\n", "line 2"),
        ("first,second,winner\na,b\n", "line 2 of .* has the winner ''"),
        ("\ufefffirst,second,winner\na,b,\x00\n", "line 2 of .* has the winner"),
        ("first,second,winner\n", "holds no votes"),
    ],
)
def test_bad_files_are_errors(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "votes.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_votes(path)
