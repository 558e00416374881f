"""Post-hoc EMA: power-function averages of the weights, of any length after the run (EDM2, arXiv 2312.02696
section 3).

In an average at time T, a profile of exponent gamma gives the network's weights at time t <= T the weight
p(t) = (gamma + 1) t^gamma / T^(gamma + 1). Its length sigma_rel is its standard deviation divided by T. Time
is counted in samples.

A run computes averages of a few lengths. A weighted sum of such averages, of several lengths and times, is an
average again, and its profile is the same sum of their profiles. An average of another length is approximated
by the sum whose profile is nearest in the mean square.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Profile:
    """Profile of a power-function average at one time."""

    samples: int
    """Time of the average, T: number of samples seen."""
    length: float
    """Relative length sigma_rel, in (0, 0.28]."""


@functools.cache
def power_exponent(length: float) -> float:
    """Return gamma of the profile with relative standard deviation `length` (EDM2, equation 126).

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved for its largest real root.
    """
    inverse_square = length**-2
    roots = np.roots([1, 7, 16 - inverse_square, 12 - inverse_square])
    return float(roots.real.max())


def profile_inner_product(a: Profile, b: Profile) -> float:
    """Integrate the product of two profiles over time; the unit is 1 / samples."""
    gamma_a, gamma_b = power_exponent(a.length), power_exponent(b.length)
    early = min(a.samples, b.samples)
    # In logarithms: the exponent of a short profile is in the hundreds.
    log_ratio = (gamma_a + 1) * math.log(early / a.samples) + (gamma_b + 1) * math.log(early / b.samples)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) / early * math.exp(log_ratio)


def posthoc_weights(kept: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """Find the weighted sum of kept averages that is nearest to a wanted one, in the mean square over time.

    Returns:
        The weight of each kept average, (len(kept),), with the sum 1; and the misfit, the norm of the
        difference of the profiles over the norm of the wanted profile: 0 for an exact sum.
    """
    gram = np.array([[profile_inner_product(a, b) for b in kept] for a in kept])
    target = np.array([profile_inner_product(a, wanted) for a in kept])
    # Neighbouring profiles are nearly equal, and the system nearly singular: hence least squares.
    weights = np.linalg.lstsq(gram, target, rcond=1e-12)[0]
    # A sum other than 1 would scale the whole network.
    weights /= weights.sum()
    missing = profile_inner_product(wanted, wanted) - 2 * weights @ target + weights @ gram @ weights
    return weights, math.sqrt(max(missing, 0.0) / profile_inner_product(wanted, wanted))
