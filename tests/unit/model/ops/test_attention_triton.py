"""The kernel for few tokens agrees with float64: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from svd_ds.model.ops import attention as module
from svd_ds.model.ops.attention import attention, self_attention
from svd_ds.model.ops.fused import triton_installed

if not triton_installed():
    pytest.skip("Triton is not installed", allow_module_level=True)

from svd_ds.model.ops import attention_triton
from svd_ds.model.ops.attention_triton import supports

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
"""Norm of the difference over norm. The interpreter cannot multiply matrices of bfloat16."""


def assert_agrees(inputs: list[Tensor], grad: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
    """Result and gradients, against the formula in float64."""
    found = [tensor.detach().requires_grad_() for tensor in inputs]
    wanted = [tensor.detach().double().requires_grad_() for tensor in inputs]
    ours, exact = attention(*found, "triton"), attention(*wanted, "reference")
    dout = grad(ours)
    pairs = zip(
        [ours, *torch.autograd.grad(ours, found, dout)],
        [exact, *torch.autograd.grad(exact, wanted, dout.double())],
        strict=True,
    )
    for number, (one, other) in enumerate(pairs):
        assert one.dtype == inputs[0].dtype and one.shape == other.shape
        error = ((one.double() - other).norm() / other.norm().clamp(min=1e-9)).item()
        assert error < TOLERANCE[inputs[0].dtype], (number, error)
    return ours


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("frames", [1, 2, 14, 16, 25, 64])
def test_strided_qkv_of_the_projection_is_read_without_a_copy(frames: int, dtype: torch.dtype) -> None:
    qkv = torch.randn(2, frames, 3, 3, 2, 32, device=DEVICE).to(dtype)  # clips, frames, pixels
    out = assert_agrees([*qkv.transpose(1, 2).unbind(3)])
    assert out.transpose(1, 2).is_contiguous(), "the next projection reads it as it lies"


def test_other_memory_layouts_agree_with_float64() -> None:
    assert assert_agrees([torch.randn(5, 9, 1, 16, device=DEVICE) for _ in range(3)]).is_contiguous()
    apart = [torch.randn(2, 9, 2, 16, device=DEVICE), torch.randn(9, 2, 2, 16, device=DEVICE).transpose(0, 1)]
    assert_agrees([apart[0], apart[1], apart[0]])
    assert_agrees([torch.randn(2, 3, 4, 2, 16, device=DEVICE) for _ in range(3)], grad=_expanded)


def _expanded(like: Tensor) -> Tensor:
    return torch.randn((), device=like.device).expand(like.shape)


def test_large_scores_do_not_overflow() -> None:
    qkv = 30 * torch.randn(3, 1, 2, 14, 1, 16, device=DEVICE)
    assert attention(*qkv, "triton").isfinite().all()


def test_auto_uses_triton_only_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_triton, "INTERPRETED", False)

    def tensor(is_cuda: bool, *shape: int, dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
        return SimpleNamespace(is_cuda=is_cuda, dtype=dtype, shape=shape)

    frames = (1, 99, 14, 5, 64)
    assert supports(tensor(True, *frames), tensor(True, *frames))
    assert not supports(tensor(False, *frames), tensor(False, *frames))
    assert not supports(tensor(True, *frames), tensor(True, 1, 99, 2, 5, 64)), "keys of another number"
    for shape in ((1, 99, 65, 5, 64), (1, 99, 14, 5, 40)):
        assert not supports(tensor(True, *shape), tensor(True, *shape))
    double = tensor(True, *frames, dtype=torch.float64)
    assert not supports(double, double)
    assert module._choose("auto", *[tensor(True, *frames)] * 2) == "triton"  # type: ignore[arg-type]


def test_gradient_of_a_projection_is_one_tensor_in_its_memory_order() -> None:
    projection = torch.randn(2, 14, 3, 3, 2, 16, device=DEVICE, requires_grad=True)  # clips, frames, pixels
    out = self_attention(projection.transpose(1, 2), "triton")
    dout = torch.randn_like(out)
    (together,) = torch.autograd.grad(out, projection, dout)
    assert together.is_contiguous()
    three = [part.detach().requires_grad_() for part in projection.transpose(1, 2).unbind(3)]
    apart = torch.autograd.grad(attention(*three, "triton"), three, dout)
    assert torch.equal(together, torch.stack(apart, dim=3).transpose(1, 2))


def test_part_of_a_larger_projection_has_its_own_gradient() -> None:
    wide = torch.randn(2, 3, 5, 3, 2, 32, device=DEVICE, requires_grad=True)
    out = self_attention(wide[..., :16], "triton")
    (found,) = torch.autograd.grad(out.square().sum(), wide)
    exact = self_attention(wide.double()[..., :16], "reference")
    (wanted,) = torch.autograd.grad(exact.square().sum(), wide)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
