"""The denoiser D around a network F, where training and sampling meet.

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)

The network is an argument: any callable `net(x_BTCHW, c_noise_B, context_BLD, scalars_BS, image_only_BT)`.
Shape legend: B clips, T frames, C channels, H x W latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svd_ds.batch import Conditioning

Network = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def scalings(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in, c_noise, each of sigma's shape (arXiv 2311.15127, equations 11 to 14).

    EDM's with data of standard deviation 1 and c_out negative: F learns v, not -v.
    """
    variance = sigma**2 + 1
    return 1 / variance, -sigma * variance.rsqrt(), variance.rsqrt(), 0.25 * sigma.log()


def network_output(net: Network, x_BTCHW: Tensor, sigma_B: Tensor, cond: Conditioning) -> Tensor:
    """F(c_in x; c_noise): (B, T, C, H, W) in x's dtype; the network sees cond.concat as further channels."""
    _, _, c_in, c_noise_B = scalings(sigma_B)
    inputs = _per_clip(c_in, x_BTCHW) * x_BTCHW
    if cond.concat_BTCHW is not None:
        inputs = torch.cat([inputs, cond.concat_BTCHW.to(inputs.dtype)], dim=2)
    output = net(inputs, c_noise_B.to(inputs.dtype), cond.context_BLD, cond.scalars_BS, cond.image_only_BT)
    return output.to(x_BTCHW.dtype)


def denoise(net: Network, x_BTCHW: Tensor, sigma_B: Tensor, cond: Conditioning) -> Tensor:
    """D(x; sigma), the estimate of the clean latents: (B, T, C, H, W) in x's dtype."""
    c_skip, c_out, _, _ = scalings(sigma_B)
    output = network_output(net, x_BTCHW, sigma_B, cond)
    return _per_clip(c_skip, x_BTCHW) * x_BTCHW + _per_clip(c_out, x_BTCHW) * output


def _per_clip(value_B: Tensor, x_BTCHW: Tensor) -> Tensor:
    return value_B.to(x_BTCHW.dtype)[:, None, None, None, None]
