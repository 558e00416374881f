"""The training error, in v-space.

The paper minimises lambda(sigma) |D - x0|^2 with lambda = (1 + sigma^2) / sigma^2 (arXiv 2311.15127 D.1; EDM,
arXiv 2206.00364 table 1, for data of standard deviation 1). With the paper's scalings lambda c_out^2 = 1 at
every sigma, so this equals the plain squared error of the network's output against v. In this form nothing is
divided by a small sigma, which would overflow or lose digits in 16 bits.

Shape legend: B clips, T frames, C channels, h x w latent pixels.
"""

from __future__ import annotations

from torch import Tensor

from svd_ds.batch import Conditioning
from svd_ds.diffusion.denoiser import Network, network_output


# The F of arXiv 2206.00364 equation 7 for D = x0, with the scalings of arXiv 2311.15127 equations 11 to 14.
def v_target(x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Compute v = (n - sigma x0) / sqrt(1 + sigma^2), the F for which D returns exactly x0.

    Args:
        x0: clean latents, (B, T, C, h, w).
        sigma: noise levels, (B,).
        noise: standard normal n, (B, T, C, h, w).

    Returns:
        (B, T, C, h, w), in x0's dtype.
    """
    sigma_B1111 = sigma.to(x0.dtype)[:, None, None, None, None]
    return (noise - sigma_B1111 * x0) * (1 + sigma_B1111**2).rsqrt()


# arXiv 2311.15127 section D.1, in v-space.
def v_loss(net: Network, x0: Tensor, sigma: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
    """Compute the squared error of v at x = x0 + sigma n, averaged over channels and pixels.

    The caller multiplies by `NoiseSchedule.weight` and averages over frames and clips.

    Args:
        net: F.
        x0: clean latents, (B, T, C, h, w); they should be float32.
        sigma: noise levels, (B,).
        noise: standard normal n, (B, T, C, h, w).
        cond: conditions.

    Returns:
        (B, T), in x0's dtype.
    """
    x_BTChw = x0 + sigma.to(x0.dtype)[:, None, None, None, None] * noise
    output_BTChw = network_output(net, x_BTChw, sigma, cond)
    return (output_BTChw - v_target(x0, sigma, noise)).square().mean(dim=(2, 3, 4))
