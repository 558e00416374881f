"""On a GPU, every backend and hand-written layer agrees with float64, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from svd_ds.model.attention import KERNELS, MAX_BATCH, attention, flash_attn_installed
from svd_ds.model.fused import conv, geglu, group_norm_silu
from svd_ds.model.unet import UNet, UNetConfig

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Norm of the difference over norm; float32 with TF32 off, as torch has it by default for products."""
SHAPES = {
    "pixels of a frame": ((4, 1536, 5, 64), 1536),
    "text": ((2, 21504, 5, 64), 77),
    "frames of a pixel": ((2, 1536, 14, 5, 64), 14),
    "two frames": ((1, 96, 2, 2, 32), 2),
    "a batch past the limit": ((MAX_BATCH + 9, 8, 1, 64), 8),
}


def assert_agrees(run: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> None:
    """`run` on the GPU in `dtype` against `run` in float64: the result and every gradient."""
    inputs = [tensor.to("cuda", dtype) for tensor in inputs]
    found, wanted = (
        [tensor.to(precision).requires_grad_() for tensor in inputs] for precision in (dtype, torch.float64)
    )
    ours, exact = run(*found), run(*wanted)
    gradient = torch.randn_like(ours)
    pairs = zip(
        [ours, *torch.autograd.grad(ours, found, gradient)],
        [exact, *torch.autograd.grad(exact, wanted, gradient.double())],
        strict=True,
    )
    for number, (one, other) in enumerate(pairs):
        error = ((one.double() - other).norm() / other.norm()).item()
        assert error < TOLERANCE[dtype], (number, error)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", KERNELS)
def test_attention(backend: str, shape: str, dtype: torch.dtype) -> None:
    if backend == "flash_attn" and (dtype == torch.float32 or not flash_attn_installed()):
        pytest.skip("flash_attn takes half precision alone" if flash_attn_installed() else "no flash_attn")
    queries, num_keys = SHAPES[shape]
    keys = (*queries[:-3], num_keys, *queries[-2:])

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, "reference" if q.dtype == torch.float64 else backend)

    assert_agrees(run, [torch.randn(queries), torch.randn(keys), torch.randn(keys)], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_layers_with_a_backward_pass_of_their_own(dtype: torch.dtype) -> None:
    norm_inputs = [torch.randn(3, 1536, 64), torch.randn(64), torch.randn(64)]
    assert_agrees(lambda x, w, b: group_norm_silu(x, w, b, 32, 1e-5, True), norm_inputs, dtype)
    assert_agrees(geglu, [torch.randn(2, 64, 512)], dtype)
    conv_inputs = [torch.randn(3, 32, 48, 64), torch.randn(96, 3, 3, 64), torch.randn(96)]
    assert_agrees(lambda x, w, b: conv(x, w, b, 1, (1, 1)), conv_inputs, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_network(dtype: torch.dtype) -> None:
    unet = UNet(UNetConfig(widths=(64, 128), attention_levels=(True, True), num_layers=1, context_width=64))
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    inputs = (torch.randn(2, 6, 8, 16, 24), torch.randn(2), torch.randn(2, 7, 64), torch.rand(2, 3) * 10)
    with torch.no_grad():
        exact = unet.double()(*(tensor.double() for tensor in inputs))
        found = unet.to("cuda", dtype)(*(tensor.cuda() for tensor in inputs))
    error = ((found.cpu().double() - exact).norm() / exact.norm()).item()
    assert error < 5 * TOLERANCE[dtype], error
