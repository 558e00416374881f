"""The training error, in v-space.

The paper minimises lambda(sigma) |D - x0|^2 with lambda = (1 + sigma^2) / sigma^2 (arXiv 2311.15127 D.1).
With its scalings lambda c_out^2 = 1 at every sigma, so the same number is the plain squared error of the
network's output against v; and nothing divides by a small sigma, which would be lost in 16 bits.

Shape legend: B clips, T frames, C channels, H x W latent pixels.
"""

from __future__ import annotations

from torch import Tensor

from svd_ds.batch import Conditioning
from svd_ds.diffusion.denoiser import Network, network_output


def v_target(x0_BTCHW: Tensor, sigma_B: Tensor, noise_BTCHW: Tensor) -> Tensor:
    """v = (n - sigma x0) / sqrt(1 + sigma^2): the F for which D returns exactly x0."""
    sigma = sigma_B.to(x0_BTCHW.dtype)[:, None, None, None, None]
    return (noise_BTCHW - sigma * x0_BTCHW) * (1 + sigma**2).rsqrt()


def v_loss(
    net: Network, x0_BTCHW: Tensor, sigma_B: Tensor, noise_BTCHW: Tensor, cond: Conditioning
) -> Tensor:
    """Squared error of v, averaged over channels and pixels: (B, T), in x0's dtype, which should be float32.

    The caller multiplies by `Noise.weight` and averages over frames and clips.
    """
    x_BTCHW = x0_BTCHW + sigma_B.to(x0_BTCHW.dtype)[:, None, None, None, None] * noise_BTCHW
    output = network_output(net, x_BTCHW, sigma_B, cond)
    return (output - v_target(x0_BTCHW, sigma_B, noise_BTCHW)).square().mean(dim=(2, 3, 4))
