"""The map from motion scores to buckets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svd_ds.data.motion import MIN_SCORE, MotionMap

SCORES = st.lists(st.floats(0, 3), min_size=1, max_size=60)


@given(SCORES, st.floats(0, 5), st.floats(0, 5))
@settings(max_examples=100, deadline=None)
def test_map_is_monotone_and_bounded(scores: list[float], one: float, other: float) -> None:
    buckets = [MotionMap.calibrate(scores).bucket(score) for score in sorted((one, other))]
    assert 0 <= buckets[0] <= buckets[1] <= 255


@given(SCORES, st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_score_is_the_inverse_of_bucket(scores: list[float], place: float) -> None:
    motion_map = MotionMap.calibrate(scores)
    low, high = motion_map.buckets[0], motion_map.buckets[-1]
    bucket = low + place * (high - low)
    assert motion_map.bucket(motion_map.score(bucket)) == pytest.approx(bucket, abs=1e-3)


def test_buckets_are_ranks() -> None:
    scores = np.random.default_rng(0).lognormal(-3, 1, 2000).tolist()
    motion_map = MotionMap.calibrate(scores)
    buckets = [motion_map.bucket(score) for score in scores]
    assert np.histogram(buckets, bins=5, range=(0, 255))[0] == pytest.approx([400] * 5, rel=0.15)
    assert motion_map.bucket(float(np.median(scores))) == pytest.approx(127.5, abs=1)


def test_equal_scores_and_no_scores_give_a_map() -> None:
    assert MotionMap.calibrate([0.2] * 9).bucket(0.2) == 127.5
    assert MotionMap.calibrate([]).scores == (MIN_SCORE,)
