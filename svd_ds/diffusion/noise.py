"""Noise levels: the densities of sigma for training, and the sequence of sigmas for sampling.

Noise is added as x = x0 + sigma * n (variance exploding), so log-SNR = -2 ln sigma.

    draws.u -> NoiseSchedule.quantile -> sigma          NoiseSchedule.weight -> multiplier of the loss

A density is given by its quantile function, which needs one uniform random number a clip. `weight` is the
loss weight of the density's source, expressed in v-space (see loss.py):

    squared error of      times that of v             weight                    minimised by
    v                     1                           1                         the SVD paper, EDM
    epsilon               1 / (1 + sigma^2)           1 / (1 + sigma^2)         DDPM, simple diffusion, VDM
    x0                    sigma^2 / (1 + sigma^2)

because v = (n - sigma x0) / sqrt(1 + sigma^2) while x = x0 + sigma n is known. u has any shape; results have
u's shape and dtype.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from svd_ds.settings import Settings, choice, number

SHIFTED = ("shifted_cosine", "interpolated_cosine")
"""Kinds of density that depend on the size of the clips."""
KINDS = ("lognormal", "discrete", "cosine", "shifted_cosine", "interpolated_cosine", "log_uniform")
"""Kinds of density."""


@dataclass(frozen=True)
class NoiseConfig(Settings, section="noise"):
    """Density of sigma in training. Each field names the kinds that use it; the others ignore it."""

    kind: str = choice("lognormal", KINDS)
    """Kind of density: lognormal, discrete, cosine, shifted_cosine, interpolated_cosine or log_uniform."""
    # Within these bounds the square of sigma never overflows float32.
    P_mean: float = number(1.0, ge=-20, le=20)
    """lognormal: mean of ln sigma."""
    P_std: float = number(1.6, gt=0, le=3.5)
    """lognormal: standard deviation of ln sigma."""
    sigma_min: float = number(0.002, ge=1e-9, le=1e9)
    """All cosines and log_uniform: smallest sigma."""
    sigma_max: float = number(700.0, ge=1e-9, le=1e9)
    """All cosines and log_uniform: largest sigma."""
    reference: float = number(64.0, gt=0, le=1e6)
    """shifted_cosine, interpolated_cosine: reference resolution of the noisy end, the side of a square in
    pixels."""
    reference_clean: float = number(256.0, gt=0, le=1e6)
    """interpolated_cosine: reference resolution of the clean end."""
    offset_noise: float = number(0.0, ge=0, le=100)
    """All kinds: deviation of offset noise, one number a channel, constant over a clip's frames and
    pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"noise.sigma_min is {self.sigma_min}: it must be below noise.sigma_max, {self.sigma_max}"
            )


class NoiseSchedule(ABC):
    """Training density of sigma, given by its quantile function, and the loss weight that belongs to it."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Return the u-quantile of sigma, for u in (0, 1); shape and dtype are u's."""

    def weight(self, sigma: Tensor) -> Tensor:
        """Return the multiplier of the squared error of v; shape and dtype are sigma's."""
        return torch.ones_like(sigma)


class EpsilonWeighted(NoiseSchedule):
    """Base class of densities whose sources minimise the plain squared error of epsilon."""

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma**2)


@dataclass(frozen=True)
class LogNormal(NoiseSchedule):
    """Log-normal density, ln sigma ~ N(mean, std^2): EDM (arXiv 2206.00364 table 1), SVD (arXiv 2311.15127
    D).

    Both weight the error of x0 by 1 / c_out^2, which is weight 1 in v-space. EDM's c_out assumes data of
    standard deviation 0.5; SVD's, and ours, assume 1, about that of latents times 0.18215.
    """

    mean: float
    std: float

    def quantile(self, u: Tensor) -> Tensor:
        return torch.exp(self.mean + self.std * torch.special.ndtri(u))


class Discrete(NoiseSchedule):
    """Uniform density over the 1000 sigmas of Stable Diffusion 2.1, 0.0292 to 14.615.

    The ablation models of the SVD paper (arXiv 2311.15127 E.2.1) have this schedule, v-parameterisation
    (weight 1) and offset noise. Betas are linear in their square root (sgm LegacyDDPMDiscretization). The
    network still gets c_noise = 0.25 ln sigma, not the index of the level.
    """

    def __init__(self, num_levels: int = 1000, beta_min: float = 0.00085, beta_max: float = 0.012) -> None:
        betas = torch.linspace(beta_min**0.5, beta_max**0.5, num_levels, dtype=torch.float64) ** 2
        alphas_bar = torch.cumprod(1 - betas, dim=0)
        self.sigmas = torch.sqrt((1 - alphas_bar) / alphas_bar)

    def quantile(self, u: Tensor) -> Tensor:
        level = (u * len(self.sigmas)).long().clamp(max=len(self.sigmas) - 1)
        # Kept on the device of u: the copy from host memory is waited for, and is made once.
        self.sigmas = self.sigmas.to(u.device)
        return self.sigmas.to(u.dtype)[level]


@dataclass(frozen=True)
class Cosine(EpsilonWeighted):
    """Cosine density: log-SNR(t) = -2 ln tan(pi t / 2) + shift, t uniform, truncated to [sigma_min,
    sigma_max].

    Without a shift it is the cosine schedule (arXiv 2102.09672) in continuous time. The shift
    2 ln(reference / d) is simple diffusion's (arXiv 2301.11093): average pooling by s multiplies the SNR by
    s^2, so an image of side d has, pooled to the reference side, the SNR of the unshifted schedule. With two
    references the log-SNR is interpolated, t logSNR(noisy) + (1 - t) logSNR(clean) (same paper), and the
    truncation is shifted, too, as in crowsonkb/k-diffusion `rand_cosine_interpolated`. simple diffusion's
    network predicts v, but its loss is the plain squared error of epsilon, hence the weight.
    """

    shift_noisy: float
    shift_clean: float
    sigma_min: float
    sigma_max: float

    def quantile(self, u: Tensor) -> Tensor:
        log_snr_noisy = self._log_snr(u, self.shift_noisy)
        log_snr_clean = self._log_snr(u, self.shift_clean)
        return torch.exp(-0.5 * (u * log_snr_noisy + (1 - u) * log_snr_clean))

    def _log_snr(self, t: Tensor, shift: float) -> Tensor:
        # A shift of log-SNR by s scales sigma by exp(-s / 2): the unshifted sigma has scaled bounds.
        scale = math.exp(-shift / 2)
        angle_min, angle_max = math.atan(self.sigma_min / scale), math.atan(self.sigma_max / scale)
        return -2 * torch.log(torch.tan(angle_min + t * (angle_max - angle_min))) + shift


@dataclass(frozen=True)
class LogUniform(EpsilonWeighted):
    """Uniform density of ln sigma between two ends; with the squared error of epsilon, the likelihood bound
    of variational diffusion models (arXiv 2107.00630)."""

    sigma_min: float
    sigma_max: float

    def quantile(self, u: Tensor) -> Tensor:
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return torch.exp(low + u * (high - low))


def build_noise_schedule(config: NoiseConfig, height: int, width: int) -> NoiseSchedule:
    """Build the density of a config.

    The shifted cosines take d = sqrt(height * width) in pixels, as simple diffusion takes the side of its
    square images. The grid of latents is 8 times smaller a side; to count latent pixels instead, multiply the
    references by 8.

    Args:
        config: kind and parameters.
        height: height of the clips in pixels.
        width: width of the clips in pixels.
    """
    match config.kind:
        case "lognormal":
            return LogNormal(config.P_mean, config.P_std)
        case "discrete":
            return Discrete()
        case "log_uniform":
            return LogUniform(config.sigma_min, config.sigma_max)
        case "cosine":
            return Cosine(0.0, 0.0, config.sigma_min, config.sigma_max)
        case "shifted_cosine":
            shift = resolution_shift(config.reference, height, width)
            return Cosine(shift, shift, config.sigma_min, config.sigma_max)
        case _:
            noisy = resolution_shift(config.reference, height, width)
            clean = resolution_shift(config.reference_clean, height, width)
            return Cosine(noisy, clean, config.sigma_min, config.sigma_max)


# simple diffusion, arXiv 2301.11093: SNR at d x d = SNR_reference (reference / d)^2.
def resolution_shift(reference: float, height: int, width: int) -> float:
    """Return the shift of log-SNR, 2 ln(reference / d) with d = sqrt(height * width) (arXiv 2301.11093)."""
    return 2 * math.log(reference / math.sqrt(height * width))


# EDM, arXiv 2206.00364 equation 5.
def karras_sigmas(
    num_steps: int, sigma_min: float = 0.002, sigma_max: float = 700.0, rho: float = 7.0
) -> Tensor:
    """Return the noise levels of sampling, from sigma_max down to sigma_min, then 0 (EDM, arXiv 2206.00364
    equation 5).

    The defaults are those of the public SVD configs.

    Returns:
        (num_steps + 1,), float64.
    """
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])
