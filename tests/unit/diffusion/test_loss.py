"""The loss in v-space is the paper's weighted loss."""

from __future__ import annotations

import torch
from torch import Tensor

from svd_ds.batch import Conditioning
from svd_ds.diffusion.denoiser import denoise, scalings
from svd_ds.diffusion.loss import v_loss, v_target

SIGMA = torch.logspace(-2.7, 2.8, 12, dtype=torch.float64)  # 0.002 to 631
COND = Conditioning(torch.zeros(12, 1, 1), torch.zeros(12, 1))


def clip() -> tuple[Tensor, Tensor]:
    x0, noise = torch.randn(2, 12, 3, 2, 4, 4, dtype=torch.float64)
    return x0, noise


def test_weight_times_c_out_squared_is_one() -> None:
    _, c_out, _, _ = scalings(SIGMA)
    torch.testing.assert_close((1 + SIGMA**2) / SIGMA**2 * c_out**2, torch.ones_like(SIGMA))


def test_v_loss_equals_the_weighted_error_of_x0() -> None:
    x0, noise = clip()
    net = lambda x, c_noise, *_: torch.sin(3 * x) + c_noise[:, None, None, None, None]  # noqa: E731
    sigma = SIGMA[:, None, None, None, None]
    denoised = denoise(net, x0 + sigma * noise, SIGMA, COND)
    weighted = (1 + sigma**2) / sigma**2 * (denoised - x0) ** 2
    error_BT = v_loss(net, x0, SIGMA, noise, COND)
    assert error_BT.shape == (12, 3)
    # At sigma = 0.002 the error of x0 is a difference of near equals: the very reason for v-space.
    torch.testing.assert_close(error_BT, weighted.mean(dim=(2, 3, 4)), rtol=1e-8, atol=0)


def test_target_is_the_output_that_recovers_x0() -> None:
    x0, noise = clip()
    target = v_target(x0, SIGMA, noise)
    x = x0 + SIGMA[:, None, None, None, None] * noise
    torch.testing.assert_close(denoise(lambda *_: target, x, SIGMA, COND), x0)
    assert v_loss(lambda *_: target, x0, SIGMA, noise, COND).max() == 0


def test_errors_are_separate_for_each_frame() -> None:
    x0, noise = clip()
    wrong = v_target(x0, SIGMA, noise).clone()
    wrong[4, 1] += 2.0
    error_BT = v_loss(lambda *_: wrong, x0, SIGMA, noise, COND)
    assert abs(error_BT[4, 1].item() - 4.0) < 1e-12 and error_BT.count_nonzero() == 1
