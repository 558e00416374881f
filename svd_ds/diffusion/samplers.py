"""Solvers of the probability-flow ODE dx / dsigma = (x - D(x; sigma)) / sigma (EDM, arXiv 2206.00364).

A sampler is a pure function of a denoiser, the initial noise and a sequence of sigmas that descends to 0
(`karras_sigmas` of noise.py).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x, sigma) -> denoised x; sigma is (B,)."""
Progress = Callable[[int], None]
"""Callback that gets the number of steps done."""
Sampler = Callable[[Denoise, Tensor, Tensor, Progress | None], Tensor]
"""(denoise, x, sigmas, progress) -> clean x, see `euler`."""


# EDM, arXiv 2206.00364 algorithm 1 without its second-order correction.
@torch.no_grad()
def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, progress: Progress | None = None) -> Tensor:
    """Integrate by Euler's method, one denoiser call a step, as the public SVD samples.

    In these variables DDIM is the same rule.

    Args:
        denoise: the denoiser.
        x: noise of standard deviation sqrt(1 + sigmas[0]^2), (B, ...).
        sigmas: noise levels, descending to 0, (num_steps + 1,).
        progress: called after each step.

    Returns:
        The sample, of x's shape.
    """
    for step, (sigma, sigma_next) in enumerate(_steps(sigmas)):
        slope = (x - denoise(x, x.new_full((len(x),), sigma))) / sigma
        x = x + (sigma_next - sigma) * slope
        if progress:
            progress(step + 1)
    return x


# EDM, arXiv 2206.00364 algorithm 1.
@torch.no_grad()
def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, progress: Progress | None = None) -> Tensor:
    """Integrate by Heun's method: two denoiser calls a step, except the last, and the mean of their slopes.

    Arguments and result are those of `euler`.
    """
    for step, (sigma, sigma_next) in enumerate(_steps(sigmas)):
        slope = (x - denoise(x, x.new_full((len(x),), sigma))) / sigma
        proposal = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope_next = (proposal - denoise(proposal, x.new_full((len(x),), sigma_next))) / sigma_next
            proposal = x + (sigma_next - sigma) * 0.5 * (slope + slope_next)
        x = proposal
        if progress:
            progress(step + 1)
    return x


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun}
"""Samplers by the name in `sampling.sampler`."""


def _steps(sigmas: Tensor) -> list[tuple[float, float]]:
    return list(pairwise(sigmas.tolist()))
