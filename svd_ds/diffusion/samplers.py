"""Solvers of the probability-flow ODE dx / dsigma = (x - D(x; sigma)) / sigma (EDM, arXiv 2206.00364).

A sampler is a function of a denoiser, a start and a ladder of sigmas that ends in 0, with nothing kept
between calls.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x, sigma_B) -> denoised x."""
Progress = Callable[[int], None]
"""Called with the number of steps done."""
Sampler = Callable[[Denoise, Tensor, Tensor, Progress | None], Tensor]


@torch.no_grad()
def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, progress: Progress | None = None) -> Tensor:
    """One denoiser call a step, as the public SVD samples (in these variables DDIM is the same rule).

    x: (B, ...), noise of standard deviation sqrt(1 + sigmas[0]^2); sigmas: (num_steps + 1,) descending to 0.
    """
    for step, (sigma, sigma_next) in enumerate(_steps(sigmas)):
        slope = (x - denoise(x, x.new_full((len(x),), sigma))) / sigma
        x = x + (sigma_next - sigma) * slope
        if progress:
            progress(step + 1)
    return x


@torch.no_grad()
def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, progress: Progress | None = None) -> Tensor:
    """Two denoiser calls a step but the last, the slope averaged over both ends (EDM, algorithm 1)."""
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


def _steps(sigmas: Tensor) -> list[tuple[float, float]]:
    return list(pairwise(sigmas.tolist()))
