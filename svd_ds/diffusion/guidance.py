"""Classifier-free guidance with one scale a frame.

Shape legend: B clips, T frames, C channels, H x W latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svd_ds.batch import Conditioning

ConditionalDenoise = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(x_BTCHW, sigma_B, cond) -> denoised x_BTCHW."""

KINDS = ("constant", "linear", "triangle")


def guidance_scale(kind: str, minimum: float, maximum: float, num_frames: int) -> Tensor:
    """The scale of every frame: float32, (T,).

    constant: `maximum` everywhere. linear: from minimum at the first frame to maximum at the last, the
    paper's rule (arXiv 2311.15127 D.4.1). triangle: minimum at both ends, maximum in the middle, for orbits
    that close (SV3D, arXiv 2403.12008; Stability-AI/generative-models guiders.py).
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
            raise ValueError(f"the guidance kind is {kind!r}, which is none of {', '.join(KINDS)}")
    return minimum + (maximum - minimum) * ramp


def guided(denoise: ConditionalDenoise, scale_T: Tensor) -> ConditionalDenoise:
    """A denoiser whose result is pushed from the unconditional towards, and past, the conditional one.

    Both branches run as one batch of 2B, unconditional first.
    """

    def guided_denoise(x_BTCHW: Tensor, sigma_B: Tensor, cond: Conditioning) -> Tensor:
        both = denoise(
            torch.cat([x_BTCHW, x_BTCHW]), torch.cat([sigma_B, sigma_B]), _stack(cond.unconditional(), cond)
        )
        unconditional, conditional = both.chunk(2)
        scale = scale_T.to(both)[:, None, None, None]
        return unconditional + scale * (conditional - unconditional)

    return guided_denoise


def _stack(first: Conditioning, second: Conditioning) -> Conditioning:
    def cat(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.cat([a, b])

    return Conditioning(
        context_BLD=torch.cat([first.context_BLD, second.context_BLD]),
        scalars_BS=torch.cat([first.scalars_BS, second.scalars_BS]),
        concat_BTCHW=cat(first.concat_BTCHW, second.concat_BTCHW),
        image_only_BT=cat(first.image_only_BT, second.image_only_BT),
    )
