"""How much noise: the densities of sigma that training draws from, and the ladder that sampling descends.

Noise is added as x = x0 + sigma * n (variance exploding), so log-SNR = -2 ln sigma.

    draws.u -> Noise.quantile -> sigma          Noise.weight -> multiplier of the loss

A density is given by its quantile function, so that one uniform number a clip is all the randomness it needs.
`weight` is what the density's source prescribes, expressed in v-space (see loss.py):

    squared error of      times that of v             weight                    minimised by
    v                     1                           1                         the SVD paper, EDM
    epsilon               1 / (1 + sigma^2)           1 / (1 + sigma^2)         DDPM, simple diffusion, VDM
    x0                    sigma^2 / (1 + sigma^2)

because v = (n - sigma x0) / sqrt(1 + sigma^2) while x = x0 + sigma n is known. Any shape goes in and comes
out, in u's dtype.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from svd_ds.settings import Settings, choice, number

SHIFTED = ("shifted_cosine", "interpolated_cosine")
"""Kinds that depend on the size of the clips."""
KINDS = ("lognormal", "discrete", "cosine", "shifted_cosine", "interpolated_cosine", "log_uniform")


@dataclass(frozen=True)
class NoiseConfig(Settings, section="noise"):
    """Which density of sigma to train on. A kind ignores the fields it does not name."""

    kind: str = choice("lognormal", KINDS)
    """lognormal, discrete, cosine, shifted_cosine, interpolated_cosine or log_uniform."""
    # Within these, no draw of sigma has a square beyond float32.
    P_mean: float = number(1.0, ge=-20, le=20)
    """lognormal: mean of ln sigma."""
    P_std: float = number(1.6, gt=0, le=3.5)
    """lognormal: standard deviation of ln sigma."""
    sigma_min: float = number(0.002, ge=1e-9, le=1e9)
    """The cosines and log_uniform: smallest sigma."""
    sigma_max: float = number(700.0, ge=1e-9, le=1e9)
    """The cosines and log_uniform: largest sigma."""
    reference: float = number(64.0, gt=0, le=1e6)
    """shifted_cosine, interpolated_cosine: side in pixels of the square whose noise the noisy end has."""
    reference_clean: float = number(256.0, gt=0, le=1e6)
    """interpolated_cosine: the same, for the clean end."""
    offset_noise: float = number(0.0, ge=0, le=100)
    """Any kind: size of a noise that is constant over a clip's frames and pixels, one number a channel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"noise.sigma_min is {self.sigma_min}: it must be below noise.sigma_max, {self.sigma_max}"
            )


class Noise(ABC):
    """A density of sigma."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """The sigma below which a share u of all draws falls; u in (0, 1), any shape."""

    def weight(self, sigma: Tensor) -> Tensor:
        """Multiplier of the squared error of v."""
        return torch.ones_like(sigma)


class EpsilonWeighted(Noise):
    """Sources that minimise the plain squared error of epsilon, whatever the network puts out."""

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma**2)


@dataclass(frozen=True)
class LogNormal(Noise):
    """ln sigma ~ N(mean, std^2): EDM (arXiv 2206.00364 table 1) and the SVD paper (arXiv 2311.15127 D).

    Both weight the error of x0 by 1 / c_out^2, which is weight 1 here. EDM's own c_out assumes data of
    standard deviation 0.5; the paper's, and ours, assume 1, which latents times 0.18215 have about.
    """

    mean: float
    std: float

    def quantile(self, u: Tensor) -> Tensor:
        return torch.exp(self.mean + self.std * torch.special.ndtri(u))


class Discrete(Noise):
    """The 1000 sigmas of Stable Diffusion 2.1, 0.0292 to 14.615, each equally likely.

    The ablation models of the SVD paper (arXiv 2311.15127 E.2.1): this schedule, v-parameterisation (weight
    1) and offset noise. Betas are linear in their square root (Stability-AI/generative-models
    LegacyDDPMDiscretization). The network is still told 0.25 ln sigma, not the index of the level.
    """

    def __init__(self, num_levels: int = 1000, beta_min: float = 0.00085, beta_max: float = 0.012) -> None:
        betas = torch.linspace(beta_min**0.5, beta_max**0.5, num_levels, dtype=torch.float64) ** 2
        alphas_bar = torch.cumprod(1 - betas, dim=0)
        self.sigmas = torch.sqrt((1 - alphas_bar) / alphas_bar)

    def quantile(self, u: Tensor) -> Tensor:
        level = (u * len(self.sigmas)).long().clamp(max=len(self.sigmas) - 1)
        return self.sigmas.to(u)[level]


@dataclass(frozen=True)
class Cosine(EpsilonWeighted):
    """log-SNR(t) = -2 ln tan(pi t / 2) + shift, t uniform, cut so that sigma ends at sigma_min and sigma_max.

    Without shift: the cosine schedule (arXiv 2102.09672) in continuous time. With 2 ln(reference / d) it is
    simple diffusion's (arXiv 2301.11093): average pooling by s multiplies SNR by s^2, so an image of side d
    pooled to the reference side has the SNR that the schedule gives there. With two references the log-SNR
    goes linearly in t from the clean end's (t = 0) to the noisy end's (t = 1), and the cut is shifted along,
    both as in crowsonkb/k-diffusion `rand_cosine_interpolated`. simple diffusion's network puts out v, but
    its loss is the plain squared error of epsilon, hence the weight.
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
        # A shift of log-SNR by s scales sigma by exp(-s / 2); the cut is made where the scaled sigma arrives.
        scale = math.exp(-shift / 2)
        angle_min, angle_max = math.atan(self.sigma_min / scale), math.atan(self.sigma_max / scale)
        return -2 * torch.log(torch.tan(angle_min + t * (angle_max - angle_min))) + shift


@dataclass(frozen=True)
class LogUniform(EpsilonWeighted):
    """ln sigma uniform between two ends: with the error of epsilon, the likelihood bound of variational
    diffusion models (arXiv 2107.00630)."""

    sigma_min: float
    sigma_max: float

    def quantile(self, u: Tensor) -> Tensor:
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return torch.exp(low + u * (high - low))


def build_noise(config: NoiseConfig, height: int, width: int) -> Noise:
    """The density that `config` names, for clips of height x width pixels.

    The shifted cosines take d = sqrt(height * width) in pixels, as simple diffusion does for its square
    images. A model of latents diffuses a grid 8 times smaller a side; to count that grid instead, multiply
    the references by 8.
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


def resolution_shift(reference: float, height: int, width: int) -> float:
    """The shift of log-SNR, 2 ln(reference / d) with d = sqrt(height * width) (arXiv 2301.11093)."""
    return 2 * math.log(reference / math.sqrt(height * width))


def karras_sigmas(
    num_steps: int, sigma_min: float = 0.002, sigma_max: float = 700.0, rho: float = 7.0
) -> Tensor:
    """The ladder of sampling, from sigma_max down to sigma_min and then 0: float64, (num_steps + 1,).

    EDM (arXiv 2206.00364 equation 5) with the ends of the public SVD configs.
    """
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])
