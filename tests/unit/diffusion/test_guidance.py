"""Guidance scales and the identities of classifier-free guidance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svd_ds.batch import Conditioning
from svd_ds.diffusion.guidance import guidance_scale, guided


def conditioning() -> Conditioning:
    return Conditioning(torch.randn(2, 1, 4), torch.randn(2, 3), torch.randn(2, 5, 4, 2, 2), None)


def denoise(x_BTCHW: Tensor, sigma_B: Tensor, cond: Conditioning) -> Tensor:
    """Any function of all inputs."""
    context = cond.context_BLD.mean(dim=(1, 2))[:, None, None, None, None]
    scalars = cond.scalars_BS.sum(dim=1)[:, None, None, None, None]
    assert cond.concat_BTChw is not None
    return torch.tanh(x_BTCHW + cond.concat_BTChw) * context + sigma_B[:, None, None, None, None] * scalars


def test_scales_are_constant_linear_or_triangular() -> None:
    assert guidance_scale("linear", 1.0, 2.5, 4).tolist() == [1.0, 1.5, 2.0, 2.5]
    assert guidance_scale("constant", 1.0, 2.5, 3).tolist() == [2.5, 2.5, 2.5]
    triangle = guidance_scale("triangle", 1.0, 2.5, 21)
    assert triangle[0] == triangle[20] == 1.0 and triangle[10] == 2.5
    torch.testing.assert_close(triangle, triangle.flip(0))
    assert guidance_scale("linear", 1.0, 2.5, 1).tolist() == [1.0]
    with pytest.raises(ValueError, match="'cubic'"):
        guidance_scale("cubic", 1.0, 2.5, 4)


def test_scale_one_is_conditional_and_zero_unconditional() -> None:
    x, sigma, cond = torch.randn(2, 5, 4, 2, 2), torch.rand(2), conditioning()
    torch.testing.assert_close(guided(denoise, torch.ones(5))(x, sigma, cond), denoise(x, sigma, cond))
    torch.testing.assert_close(
        guided(denoise, torch.zeros(5))(x, sigma, cond), denoise(x, sigma, cond.unconditional())
    )


def test_each_frame_has_its_scale_and_both_branches_run_as_one_batch() -> None:
    x, sigma, cond = torch.randn(2, 5, 4, 2, 2), torch.rand(2), conditioning()
    sizes = []

    def counted(x_BTCHW: Tensor, sigma_B: Tensor, cond: Conditioning) -> Tensor:
        sizes.append((len(x_BTCHW), len(sigma_B), len(cond.scalars_BS)))
        return denoise(x_BTCHW, sigma_B, cond)

    result = guided(counted, guidance_scale("linear", 1.0, 3.0, 5))(x, sigma, cond)
    assert sizes == [(4, 4, 4)]
    conditional, unconditional = denoise(x, sigma, cond), denoise(x, sigma, cond.unconditional())
    for frame, scale in enumerate([1.0, 1.5, 2.0, 2.5, 3.0]):
        expected = unconditional[:, frame] + scale * (conditional[:, frame] - unconditional[:, frame])
        torch.testing.assert_close(result[:, frame], expected)
