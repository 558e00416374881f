"""Classifier-free guidance with one scale per frame (arXiv 2311.15127 D.4.1).

Shape legend: B clips, T frames, C channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svd_ds.batch import Conditioning

ConditionalDenoise = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x, sigma, cond) -> denoised x; x is (B, T, C, h, w), sigma (B,)."""

KINDS = ("constant", "linear", "triangle")
"""Schedules of the scale over the frames."""


# SVD, arXiv 2311.15127 section D.4.1 (linear); SV3D section 3 (triangle).
def guidance_scale(kind: str, minimum: float, maximum: float, num_frames: int) -> Tensor:
    """Compute the scale of every frame.

    Args:
        kind: one of KINDS. constant: `maximum` everywhere. linear: from `minimum` at the first frame to
            `maximum` at the last, the paper's rule (arXiv 2311.15127 D.4.1). triangle: `minimum` at both
            ends, `maximum` in the middle, for closed orbits (SV3D, arXiv 2403.12008; sgm guiders.py).
        minimum: the smallest scale.
        maximum: the largest scale.
        num_frames: T.

    Returns:
        (T,), float32.

    Raises:
        ValueError: there is no such kind.
    """
    ramp = torch.linspace(0, 1, num_frames)
    match kind:
        case "constant":
            ramp = torch.ones(num_frames)
        case "linear":
            pass
        case "triangle":
            ramp = 1 - (2 * ramp - 1).abs()
        case _:
            raise ValueError(f"the guidance kind is {kind!r}: it must be one of {', '.join(KINDS)}")
    return minimum + (maximum - minimum) * ramp


# arXiv 2311.15127 section D.4.1: D_guided = D_uncond + scale_t (D_cond - D_uncond), with one scale a frame.
def guided(denoise: ConditionalDenoise, scale: Tensor) -> ConditionalDenoise:
    """Make a denoiser that returns uncond + scale (cond - uncond).

    Both branches run as one batch of 2B, unconditional first.

    Args:
        denoise: the denoiser.
        scale: scale of every frame, (T,).
    """

    def guided_denoise(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        both = denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), _stack(cond.unconditional(), cond))
        unconditional, conditional = both.chunk(2)
        return unconditional + scale.to(both)[:, None, None, None] * (conditional - unconditional)

    return guided_denoise


def _stack(first: Conditioning, second: Conditioning) -> Conditioning:
    def cat(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.cat([a, b])

    return Conditioning(
        context_BLD=torch.cat([first.context_BLD, second.context_BLD]),
        scalars_BS=torch.cat([first.scalars_BS, second.scalars_BS]),
        concat_BTChw=cat(first.concat_BTChw, second.concat_BTChw),
        image_only_BT=cat(first.image_only_BT, second.image_only_BT),
    )
