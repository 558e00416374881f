"""Custom layers equal torch to the last digits, and save nothing but their inputs for backward."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from svd_ds.model.ops import fused
from svd_ds.model.ops.fused import check_kernels, conv, geglu, group_norm_silu


def expected(x_NSC: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    y = F.group_norm(x_NSC.transpose(1, 2), 4, weight, bias, eps=1e-5).transpose(1, 2)
    return F.silu(y) if silu else y


@pytest.mark.parametrize("few", [0, fused.SMALL_NUMEL], ids=["ours", "torch's"])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", [(2, 30, 16), (3, 1, 8), (1, 7, 4)])
def test_values_and_gradients_equal_torch(
    shape: tuple[int, int, int], silu: bool, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "SMALL_NUMEL", few)
    inputs = [torch.randn(shape), torch.randn(shape[2]), torch.randn(shape[2])]
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    ours, theirs = group_norm_silu(*inputs, 4, 1e-5, silu), expected(*inputs, silu)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    for found, wanted in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_gradients_pass_gradcheck() -> None:
    inputs = [torch.randn(2, 3, 8), torch.randn(8), torch.randn(8)]
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm_silu(x, w, b, 4, 1e-5, True), inputs)


def test_large_frame_with_a_large_mean_keeps_its_precision() -> None:
    x = torch.randn(1, 72 * 128, 8) + 10
    weight, bias = torch.ones(8), torch.zeros(8)
    exact = expected(x.double(), weight.double(), bias.double(), silu=True)
    error = (group_norm_silu(x, weight, bias, 4, 1e-5, True) - exact).norm() / exact.norm()
    assert error < 1e-6


def test_half_precision_rounds_once_more_than_torch_at_most() -> None:
    inputs = [torch.randn(2, 500, 16) + 3, torch.randn(16), torch.randn(16)]
    half = [tensor.bfloat16().requires_grad_() for tensor in inputs]
    single = [tensor.detach().float().requires_grad_() for tensor in half]
    found, wanted = group_norm_silu(*half, 4, 1e-5, True), expected(*single, True)
    grad = torch.randn_like(found)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=2**-6, atol=1e-3)
    for ours, theirs in zip(
        torch.autograd.grad(found, half, grad), torch.autograd.grad(wanted, single, grad.float()), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("stride", "padding"), [(1, (1, 1)), (2, (1, 1)), (1, (1, 0))])
def test_convolution_equals_torch(stride: int, padding: tuple[int, int], bias: bool) -> None:
    x, weight = torch.randn(2, 4, 6, 3, dtype=torch.float64), torch.randn(5, 3, 3, 3, dtype=torch.float64)
    inputs = [x, weight, *([torch.randn(5, dtype=torch.float64)] if bias else [])]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    ours = conv(*inputs[:2], inputs[2] if bias else None, stride, padding)
    first = (tensor.permute(0, 3, 1, 2) for tensor in inputs[:2])
    theirs = F.conv2d(*first, *inputs[2:], stride=stride, padding=padding).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    for found, wanted in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_convolution_saves_the_parameter_and_no_view_of_it() -> None:
    """A view would keep the memory that ZeRO-3 gathered after it let go of the parameter."""
    weight, kept = torch.nn.Parameter(torch.randn(5, 3, 3, 4)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        conv(torch.randn(2, 6, 6, 4), weight, None, padding=(1, 1))
    assert any(tensor is weight for tensor in kept)
    assert all(tensor is weight or tensor.data_ptr() != weight.data_ptr() for tensor in kept)


def test_geglu_equals_a_gated_gelu() -> None:
    proj = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    hidden, gate = proj.split(5, dim=-1)
    torch.testing.assert_close(geglu(proj), hidden * F.gelu(gate))
    assert torch.autograd.gradcheck(geglu, proj)


def test_geglu_in_half_precision_rounds_once() -> None:
    exact = torch.randn(2, 3, 128).bfloat16().double().requires_grad_()
    proj = exact.detach().bfloat16().requires_grad_()
    hidden, gate = exact.chunk(2, dim=-1)
    gradient = torch.randn(2, 3, 64).bfloat16()
    wanted, found = hidden * F.gelu(gate), geglu(proj)
    pairs = [(found, wanted)]
    pairs += zip(
        torch.autograd.grad(found, proj, gradient),
        torch.autograd.grad(wanted, exact, gradient.double()),
        strict=True,
    )
    for ours, theirs in pairs:
        assert (ours.double() - theirs).norm() / theirs.norm() < 2.0**-7


@pytest.mark.parametrize(
    "layer", [geglu, lambda x: group_norm_silu(x, torch.ones(16), torch.zeros(16), 4, 1e-5, True)]
)
def test_only_the_input_is_saved_for_backward(layer: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 100, 16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    large = [tensor for tensor in kept if tensor.numel() >= x.numel() / 2]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]


@pytest.mark.parametrize(
    ("kernels", "device", "dtype", "installed", "runs_on"),
    [
        ("auto", "cuda", torch.bfloat16, True, "triton"),
        ("auto", "cuda", torch.float64, True, "torch"),
        ("auto", "cuda", torch.bfloat16, False, "torch"),
        ("auto", "cpu", torch.float32, True, "torch"),
        ("torch", "cuda", torch.bfloat16, True, "torch"),
        ("triton", "cuda", torch.float16, True, "triton"),
        ("triton", "meta", torch.float32, True, "torch"),
    ],
)
def test_kernel_choice_depends_on_setting_device_and_dtype(
    kernels: str,
    device: str,
    dtype: torch.dtype,
    installed: bool,
    runs_on: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("svd_ds.model.ops.fused_triton")
    module.GEGLU = module.GroupNormSiLU = SimpleNamespace(apply=lambda *inputs: "triton")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "svd_ds.model.ops.kernels", SimpleNamespace(INTERPRETED=False))
    monkeypatch.setattr(fused, "triton_installed", lambda: installed)
    for torchs in ("_GEGLU", "_GroupNormSiLU"):
        monkeypatch.setattr(fused, torchs, SimpleNamespace(apply=lambda *inputs: "torch"))
    x = SimpleNamespace(
        device=torch.device(device),
        is_cuda=device == "cuda",
        is_meta=device == "meta",
        is_cpu=False,
        dtype=dtype,
    )
    assert geglu(x, kernels) == runs_on
    assert group_norm_silu(x, None, None, 4, 1e-5, True, kernels) == runs_on


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(fused, "triton_installed", lambda: False)
    for device in (cpu, gpu):
        check_kernels("auto", device)
        with pytest.raises(ValueError, match=r"model.kernels is triton, which is not installed"):
            check_kernels("triton", device)
    monkeypatch.setattr(fused, "triton_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "svd_ds.model.ops.kernels", SimpleNamespace(INTERPRETED=False))
    check_kernels("triton", gpu)
    with pytest.raises(ValueError, match=r"model.kernels is triton, which needs a GPU"):
        geglu(torch.randn(2, 4), kernels="triton")
