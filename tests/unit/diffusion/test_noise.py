"""The densities of sigma against their published numbers."""

from __future__ import annotations

import math

import pytest
import torch

from svd_ds.command_line import CONF
from svd_ds.compose import compose
from svd_ds.diffusion.noise import (
    KINDS,
    Discrete,
    NoiseConfig,
    build_noise_schedule,
    karras_sigmas,
    resolution_shift,
)

NAMES = sorted(path.stem for path in (CONF / "noise").glob("*.yaml"))

# (P_mean, P_std) -> sigma at 5, 25, 50, 75, 95 and 99 %
QUANTILES = {
    "svd_image": (0.058, 0.153, 0.301, 0.591, 1.56, 3.08),
    "edm": (0.042, 0.134, 0.301, 0.677, 2.17, 4.91),
    "svd_base": (0.193, 0.509, 1.00, 1.96, 5.18, 10.2),
    "svd_t2v": (0.165, 0.641, 1.65, 4.24, 16.5, 42.8),
    "svd_i2v_base": (0.145, 0.684, 2.01, 5.93, 28.0, 83.3),
    "svd_i2v": (0.196, 0.924, 2.72, 8.00, 37.8, 112.0),
    "svd_interpolation": (0.378, 1.21, 2.72, 6.11, 19.6, 44.3),
}
LEVELS = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95, 0.99], dtype=torch.float64)


def load(name: str) -> NoiseConfig:
    return compose([f"noise={name}"]).noise


@pytest.mark.parametrize("name", QUANTILES)
def test_sampled_quantiles_equal_the_paper(name: str) -> None:
    noise = build_noise_schedule(load(name), 320, 576)
    u = torch.rand(400_000, dtype=torch.float64)
    sampled = torch.quantile(noise.quantile(u), LEVELS)
    expected = torch.tensor(QUANTILES[name], dtype=torch.float64)
    torch.testing.assert_close(sampled, expected, rtol=0.03, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_quantiles_of_every_config_file_are_finite_and_increasing(name: str) -> None:
    noise = build_noise_schedule(load(name), 576, 1024)
    u = torch.linspace(1e-9, 1 - 1e-9, 1001, dtype=torch.float64)
    sigma = noise.quantile(u)
    assert sigma.isfinite().all() and (sigma > 0).all()
    assert (sigma.diff() >= 0).all() and sigma[-1] > 10 * sigma[0]
    assert noise.weight(sigma).shape == sigma.shape
    assert noise.quantile(u.float().reshape(7, 143)).shape == (7, 143)


def test_every_kind_has_a_config_file() -> None:
    assert {load(name).kind for name in NAMES} == set(KINDS)


def test_discrete_levels_equal_stable_diffusion() -> None:
    sigmas = Discrete().sigmas
    assert len(sigmas) == 1000
    assert sigmas[0].item() == pytest.approx(0.0292, abs=5e-5)
    assert sigmas[-1].item() == pytest.approx(14.6146, abs=5e-4)
    drawn = Discrete().quantile((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    torch.testing.assert_close(drawn, sigmas, rtol=0, atol=0)  # each exactly once


def test_cosine_is_uniform_in_angle() -> None:
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    sigma = build_noise_schedule(NoiseConfig("cosine", sigma_min=1e-9, sigma_max=1e9), 8, 8).quantile(u)
    torch.testing.assert_close(-2 * sigma.log(), -2 * torch.tan(math.pi * u / 2).log())


@pytest.mark.parametrize(("height", "width"), [(64, 64), (256, 256), (320, 576), (576, 1024)])
def test_shifted_cosine_moves_log_snr_by_the_resolution(height: int, width: int) -> None:
    shift = 2 * math.log(64 / math.sqrt(height * width))
    assert resolution_shift(64, height, width) == pytest.approx(shift)
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    wide = {"sigma_min": 1e-7, "sigma_max": 1e7}
    plain = build_noise_schedule(NoiseConfig("cosine", **wide), height, width).quantile(u)
    shifted = build_noise_schedule(NoiseConfig("shifted_cosine", **wide), height, width).quantile(u)
    torch.testing.assert_close(
        -2 * shifted.log() + 2 * plain.log(), torch.full_like(u, shift), rtol=1e-4, atol=1e-4
    )


def test_interpolated_cosine_combines_two_shifts_and_keeps_its_bounds() -> None:
    config = NoiseConfig(
        "interpolated_cosine", reference=32, reference_clean=256, sigma_min=1e-3, sigma_max=1e3
    )
    noise = build_noise_schedule(config, 512, 512)
    ends = noise.quantile(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([1e-3, 1e3], dtype=torch.float64))
    # Half way between 2 ln(32 / 512) and 2 ln(256 / 512), where the cosine itself is 0.
    middle = noise.quantile(torch.tensor(0.5, dtype=torch.float64))
    assert -2 * middle.log().item() == pytest.approx(math.log(32 / 512) + math.log(256 / 512), abs=0.05)


def test_weighted_error_of_v_is_the_error_of_epsilon() -> None:
    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)
    x0, n, v_error = torch.randn(3, 9, dtype=torch.float64)
    x = x0 + sigma * n
    root = (1 + sigma**2).sqrt()
    v_guess = (n - sigma * x0) / root + v_error
    x0_guess = x / root**2 - sigma / root * v_guess  # c_skip x + c_out F
    epsilon_guess = (x - x0_guess) / sigma
    weight = build_noise_schedule(NoiseConfig("cosine"), 8, 8).weight(sigma)
    torch.testing.assert_close(weight * v_error**2, (epsilon_guess - n) ** 2)


def test_karras_sigmas_span_the_public_range() -> None:
    sigmas = karras_sigmas(25)
    assert sigmas.shape == (26,)
    assert sigmas[0].item() == pytest.approx(700) and sigmas[-2].item() == pytest.approx(0.002)
    assert sigmas[-1] == 0
    half_way = ((700 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert sigmas[12].item() == pytest.approx(half_way)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"kind": "gaussian"}, ["noise.kind", "gaussian"]),
        ({"P_std": 0.0}, ["noise.P_std", "0.0"]),
        ({"sigma_min": 5.0, "sigma_max": 2.0}, ["5.0", "2.0"]),
        ({"reference": 0.0}, ["noise.reference", "0.0", "above 0"]),
        ({"offset_noise": -0.1}, ["noise.offset_noise", "-0.1"]),
    ],
)
def test_invalid_settings_are_named(fields: dict, names: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        NoiseConfig(**fields)
    assert all(name in str(error.value) for name in names)
