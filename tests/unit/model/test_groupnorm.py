"""Our group norm with SiLU is torch's, to the last digits, in memory that ends in channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from svd_ds.model.groupnorm import group_norm_silu


def expected(x_NSC: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    y = F.group_norm(x_NSC.transpose(1, 2), 4, weight, bias, eps=1e-5).transpose(1, 2)
    return F.silu(y) if silu else y


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", [(2, 30, 16), (3, 1, 8), (1, 7, 4)])
def test_values_and_gradients_are_torchs(shape: tuple[int, int, int], silu: bool) -> None:
    inputs = [torch.randn(shape), torch.randn(shape[2]), torch.randn(shape[2])]
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    ours, theirs = group_norm_silu(*inputs, 4, 1e-5, silu), expected(*inputs, silu)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    for found, wanted in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_gradients_are_those_of_the_values() -> None:
    inputs = [torch.randn(2, 3, 8), torch.randn(8), torch.randn(8)]
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm_silu(x, w, b, 4, 1e-5, True), inputs)


def test_a_large_frame_far_from_zero_keeps_its_digits() -> None:
    x = torch.randn(1, 72 * 128, 8) + 10
    weight, bias = torch.ones(8), torch.zeros(8)
    exact = expected(x.double(), weight.double(), bias.double(), silu=True)
    error = (group_norm_silu(x, weight, bias, 4, 1e-5, True) - exact).norm() / exact.norm()
    assert error < 1e-6


def test_half_precision_only_rounds_the_result() -> None:
    x, weight, bias = torch.randn(2, 500, 16) + 3, torch.randn(16), torch.randn(16)
    x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    found = group_norm_silu(x, weight, bias, 4, 1e-5, True)
    assert found.dtype == torch.bfloat16
    wanted = expected(x.float(), weight.float(), bias.float(), True)
    torch.testing.assert_close(found, wanted.bfloat16(), rtol=2**-7, atol=1e-3)


def test_nothing_but_the_input_is_kept_for_the_backward_pass() -> None:
    x = torch.randn(2, 100, 16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        group_norm_silu(x, torch.ones(16), torch.zeros(16), 4, 1e-5, True)
    large = [tensor for tensor in kept if tensor.numel() >= x.numel()]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]
