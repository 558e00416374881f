"""The denoiser D around a network F, used by training and by sampling.

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)        (EDM, arXiv 2206.00364 equation 7)

Shape legend: B clips, T frames, C channels, h x w latent pixels, L context tokens, D context width, S
scalars.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svd_ds.batch import Conditioning

Network = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""F, any callable `net(x, c_noise, context, scalars, image_only)`: (B, T, C, h, w), (B,), (B, L, D), (B, S),
(B, T) bool or None -> (B, T, C, h, w)."""


# SVD, arXiv 2311.15127 equations 11 to 14.
def scalings(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the preconditioning, the v-prediction row of arXiv 2311.15127 (equations 11 to 14).

    It is EDM's (arXiv 2206.00364 table 1) for data of standard deviation 1, with another sign of c_out: F
    predicts v, not -v.

    Args:
        sigma: noise levels, any shape.

    Returns:
        c_skip = 1 / (sigma^2 + 1), c_out = -sigma / sqrt(sigma^2 + 1), c_in = 1 / sqrt(sigma^2 + 1) and
        c_noise = 0.25 ln sigma, each of sigma's shape.
    """
    variance = sigma**2 + 1
    return 1 / variance, -sigma * variance.rsqrt(), variance.rsqrt(), 0.25 * sigma.log()


# EDM, arXiv 2206.00364 equation 7: F(c_in x; c_noise).
def network_output(net: Network, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
    """Compute F(c_in x; c_noise); `cond.concat` is appended to the input channels (arXiv 2311.15127 D.4).

    Args:
        net: F.
        x: noisy latents, (B, T, C, h, w).
        sigma: noise levels, (B,).
        cond: conditions.

    Returns:
        (B, T, C, h, w), in x's dtype.
    """
    _, _, c_in_B, c_noise_B = scalings(sigma)
    inputs_BTChw = _per_clip(c_in_B, x) * x
    if cond.concat_BTChw is not None:
        inputs_BTChw = torch.cat([inputs_BTChw, cond.concat_BTChw.to(x.dtype)], dim=2)
    output_BTChw = net(
        inputs_BTChw, c_noise_B.to(x.dtype), cond.context_BLD, cond.scalars_BS, cond.image_only_BT
    )
    return output_BTChw.to(x.dtype)


# EDM, arXiv 2206.00364 equation 7.
def denoise(net: Network, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
    """Compute D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), the estimate of the clean latents.

    Args:
        net: F.
        x: noisy latents, (B, T, C, h, w).
        sigma: noise levels, (B,).
        cond: conditions.

    Returns:
        (B, T, C, h, w), in x's dtype.
    """
    c_skip_B, c_out_B, _, _ = scalings(sigma)
    output_BTChw = network_output(net, x, sigma, cond)
    return _per_clip(c_skip_B, x) * x + _per_clip(c_out_B, x) * output_BTChw


def _per_clip(value_B: Tensor, x_BTChw: Tensor) -> Tensor:
    return value_B.to(x_BTChw.dtype)[:, None, None, None, None]
