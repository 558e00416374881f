"""Motion map: motion score -> motion bucket, the scalar condition, and back.

The released model is conditioned on a bucket of 0 to 255; its relation to the optical flow is not published
(arXiv 2311.15127, section D.2). Here it is the clip's rank among the data set's scores: quantiles of the
scores are spread evenly over 0 to 255, linear in log flow between them. So bucket 127 is the median motion of
the training data, and every part of the range is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_BUCKET = 255.0
MIN_SCORE = 1e-4
"""Score of a standstill, in shortest sides per second: a tenth of a pixel per second at 1080 lines."""
NUM_QUANTILES = 17


@dataclass(frozen=True)
class MotionMap:
    """Monotone map from motion scores (`flow.motion_score`) to buckets, kept in the index's header."""

    scores: tuple[float, ...]
    """Knots of the map, ascending, at least MIN_SCORE."""
    buckets: tuple[float, ...]
    """Bucket of each score, ascending, 0 to 255."""

    @staticmethod
    def calibrate(scores: Sequence[float]) -> MotionMap:
        """Build the map that spreads `scores` evenly over 0 to 255.

        Without scores, the map has the single knot MIN_SCORE.
        """
        floored = np.maximum(np.asarray([*scores] or [MIN_SCORE], dtype=np.float64), MIN_SCORE)
        levels = np.linspace(0.0, 1.0, NUM_QUANTILES)
        quantiles = np.quantile(floored, levels)
        # Equal quantiles become one knot at their middle level, so that the map stays invertible.
        knots = np.unique(quantiles)
        middles = [MAX_BUCKET * levels[quantiles == knot].mean() for knot in knots]
        return MotionMap(tuple(float(knot) for knot in knots), tuple(float(middle) for middle in middles))

    @staticmethod
    def mixture(maps: Sequence[MotionMap], weights: Sequence[float]) -> MotionMap:
        """Build the map of a mixture of data sets, given their maps and the weights of drawing from them.

        A rank in the mixture is the weighted mean of the ranks in its parts. A part without motion, such as
        images, has a map of a single knot and no ranks: it counts only if no part has motion.
        """
        ranking = [(m, w) for m, w in zip(maps, weights, strict=True) if len(m.scores) > 1]
        if len(ranking) < 2:
            return ranking[0][0] if ranking else maps[0]
        total = sum(weight for _, weight in ranking)
        knots = sorted({score for motion_map, _ in ranking for score in motion_map.scores})
        ranks = [sum(weight * m.bucket(knot) for m, weight in ranking) / total for knot in knots]
        return MotionMap(tuple(knots), tuple(ranks))

    def bucket(self, score: float) -> float:
        """Return the bucket of a score; a score outside the calibrated range gets that of the
        nearest end."""
        return float(np.interp(np.log(max(score, MIN_SCORE)), np.log(self.scores), self.buckets))

    def score(self, bucket: float) -> float:
        """Return the score of a bucket: the inverse of `bucket` inside the calibrated range."""
        return float(np.exp(np.interp(bucket, self.buckets, np.log(self.scores))))
