"""Scalings of the denoiser, and the inputs of its network."""

from __future__ import annotations

import torch
from torch import Tensor

from svd_ds.batch import Conditioning
from svd_ds.diffusion.denoiser import denoise, network_output, scalings


def conditioning(concat: Tensor | None = None) -> Conditioning:
    return Conditioning(torch.randn(2, 1, 5), torch.randn(2, 3), concat, torch.zeros(2, 3, dtype=torch.bool))


def test_scalings_equal_the_paper() -> None:
    sigma = torch.tensor([0.002, 1.0, 3.0, 700.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = scalings(sigma)
    torch.testing.assert_close(c_skip, 1 / (sigma**2 + 1))
    torch.testing.assert_close(c_out, -sigma / (sigma**2 + 1).sqrt())
    torch.testing.assert_close(c_in, 1 / (sigma**2 + 1).sqrt())
    assert abs(c_noise[0].item() - -1.5537) < 1e-4 and abs(c_noise[-1].item() - 1.6378) < 1e-4


def test_network_input_is_scaled_latents_then_unscaled_concat() -> None:
    seen = {}

    def net(
        x: Tensor, c_noise: Tensor, context: Tensor, scalars: Tensor, image_only: Tensor | None
    ) -> Tensor:
        seen.update(x=x, c_noise=c_noise, context=context, scalars=scalars, image_only=image_only)
        return x[:, :, :4]

    x, concat = torch.randn(2, 3, 4, 6, 5), torch.randn(2, 3, 4, 6, 5)
    sigma = torch.tensor([0.5, 40.0])
    cond = conditioning(concat)
    output = network_output(net, x, sigma, cond)
    expected = x / (1 + sigma**2).sqrt()[:, None, None, None, None]
    torch.testing.assert_close(seen["x"], torch.cat([expected, concat], dim=2))
    torch.testing.assert_close(seen["c_noise"], 0.25 * sigma.log())
    assert seen["context"] is cond.context_BLD and seen["scalars"] is cond.scalars_BS
    assert seen["image_only"] is cond.image_only_BT
    torch.testing.assert_close(output, expected)


def test_denoised_is_skip_plus_scaled_output_in_the_dtype_of_x() -> None:
    x, constant = torch.randn(2, 3, 4, 6, 5), torch.randn(2, 3, 4, 6, 5)
    sigma = torch.tensor([0.5, 40.0])
    denoised = denoise(lambda *inputs: constant.bfloat16(), x, sigma, conditioning())
    c_skip, c_out, _, _ = (value[:, None, None, None, None] for value in scalings(sigma))
    assert denoised.dtype == torch.float32
    torch.testing.assert_close(denoised, c_skip * x + c_out * constant.bfloat16().float())
