"""Power-function averages of the weights, and any length of them after the run (arXiv 2312.02696, section 3).

A profile of exponent gamma gives the weights of time t, up to now T, the share
p(t) = (gamma + 1) t^gamma / T^(gamma + 1). Its length is its standard deviation over T. Time is samples seen.

A run averages a few lengths as it goes. A sum of such averages, of several lengths and moments, is an average
again, whose profile is the same sum of their profiles: so another length is the sum that comes nearest to it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Profile:
    """A power-function average at one moment."""

    samples: int
    """Seen until then: T."""
    length: float
    """sigma_rel, in (0, 0.28]."""


@functools.cache
def power_exponent(length: float) -> float:
    """gamma of the profile with relative standard deviation `length` (arXiv 2312.02696, equation 126).

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved for its largest real root.
    """
    inverse_square = length**-2
    roots = np.roots([1, 7, 16 - inverse_square, 12 - inverse_square])
    return float(roots.real.max())


def profile_inner_product(a: Profile, b: Profile) -> float:
    """The integral of the two profiles' product over time; in 1 / samples."""
    gamma_a, gamma_b = power_exponent(a.length), power_exponent(b.length)
    early = min(a.samples, b.samples)
    # Through logarithms: a short profile's exponent is in the hundreds.
    log_ratio = (gamma_a + 1) * math.log(early / a.samples) + (gamma_b + 1) * math.log(early / b.samples)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) / early * math.exp(log_ratio)


def posthoc_weights(kept: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """The sum of the kept averages that comes nearest to the wanted one, in the mean square over time.

    Returns:
        The weight of each, (len(kept),), 1 in all; and the misfit, the norm of what is missing as a share of
        the wanted profile's: 0 for an exact sum.
    """
    gram = np.array([[profile_inner_product(a, b) for b in kept] for a in kept])
    target = np.array([profile_inner_product(a, wanted) for a in kept])
    # Neighbours are nearly the same profile: least squares leaves alone what cannot be told apart.
    weights = np.linalg.lstsq(gram, target, rcond=1e-12)[0]
    # What falls short of 1 would scale the whole network.
    weights /= weights.sum()
    missing = profile_inner_product(wanted, wanted) - 2 * weights @ target + weights @ gram @ weights
    return weights, math.sqrt(max(missing, 0.0) / profile_inner_product(wanted, wanted))
