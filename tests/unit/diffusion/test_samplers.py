"""Samplers recover distributions whose denoiser is known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svd_ds.batch import Conditioning
from svd_ds.diffusion.denoiser import denoise
from svd_ds.diffusion.noise import karras_sigmas
from svd_ds.diffusion.samplers import SAMPLERS, euler, heun

MEAN, STD = 3.0, 0.5


def denoise_gaussian(x: Tensor, sigma_B: Tensor) -> Tensor:
    """E[x0 | x] for x0 ~ N(MEAN, STD^2)."""
    variance = sigma_B[:, None] ** 2
    return (STD**2 * x + variance * MEAN) / (STD**2 + variance)


def start(num: int, sigmas: Tensor) -> Tensor:
    return torch.randn(num, 1, dtype=torch.float64) * (1 + sigmas[0] ** 2).sqrt()


@pytest.mark.parametrize("name", SAMPLERS)
def test_point_distribution_is_recovered_exactly(name: str) -> None:
    point = torch.randn(4, 2, 3, dtype=torch.float64)
    sigmas = karras_sigmas(5)
    result = SAMPLERS[name](lambda x, sigma_B: point, 700 * torch.randn_like(point), sigmas, None)
    torch.testing.assert_close(result, point)


def test_gaussian_is_recovered() -> None:
    sigmas = karras_sigmas(60)
    x = heun(denoise_gaussian, start(20_000, sigmas), sigmas)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(STD, abs=0.01)


def test_heun_has_order_two_and_euler_order_one() -> None:
    """Against the exact flow, which maps the start by (x - MEAN) * STD / sqrt(STD^2 + sigma_0^2)."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    errors = {}
    for name, sampler in SAMPLERS.items():
        for num_steps in (64, 128):
            sigmas = karras_sigmas(num_steps, sigma_max=20.0)
            begin = x * (1 + sigmas[0] ** 2).sqrt()
            exact = MEAN + (begin - MEAN) * STD / (STD**2 + sigmas[0] ** 2).sqrt()
            errors[name, num_steps] = (
                (sampler(denoise_gaussian, begin, sigmas, None) - exact).abs().max().item()
            )
    assert errors["euler", 64] / errors["euler", 128] == pytest.approx(2, rel=0.1)
    assert errors["heun", 64] / errors["heun", 128] > 3.5
    assert errors["heun", 128] < 0.1 * errors["euler", 128]


def test_progress_counts_steps_and_the_denoiser_sees_every_sigma() -> None:
    sigmas, seen, steps = karras_sigmas(6), [], []

    def denoise(x: Tensor, sigma_B: Tensor) -> Tensor:
        assert sigma_B.shape == (2,)
        seen.append(sigma_B[0].item())
        return 0 * x

    euler(denoise, torch.randn(2, 3, dtype=torch.float64), sigmas, steps.append)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert seen == sigmas[:-1].tolist()
    seen.clear()
    heun(denoise, torch.randn(2, 3, dtype=torch.float64), sigmas)
    assert len(seen) == 2 * 6 - 1


def test_euler_equals_the_public_pipeline() -> None:
    """diffusers' EulerDiscreteScheduler as stable-video-diffusion-img2vid configures it, around the same
    network."""
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",
        steps_offset=1,
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    scheduler.set_timesteps(25)
    cond = Conditioning(torch.zeros(2, 1, 1), torch.zeros(2, 1))

    def net(x: Tensor, c_noise_B: Tensor, *_: object) -> Tensor:
        return torch.sin(x + c_noise_B[:, None, None, None, None])

    begin = torch.randn(2, 3, 4, 5, 5) * scheduler.init_noise_sigma
    theirs = begin
    for c_noise in scheduler.timesteps:
        inputs = scheduler.scale_model_input(theirs, c_noise)
        theirs = scheduler.step(net(inputs, c_noise.expand(2)), c_noise, theirs).prev_sample
    ours = euler(lambda x, sigma_B: denoise(net, x, sigma_B, cond), begin, karras_sigmas(25))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
