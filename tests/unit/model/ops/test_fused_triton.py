"""Triton kernels agree with float64 at any shape: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from svd_ds.model.ops.fused import geglu, group_norm_silu, triton_installed
from svd_ds.model.unet import UNet
from svd_ds.parallel.recompute import apply_recompute
from tests.networks import SMALL

if not triton_installed():
    pytest.skip("Triton is not installed", allow_module_level=True)

from svd_ds.model import layers
from svd_ds.model.ops import fused_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bfloat16 off where a GPU rounds it.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Norm of the difference over norm."""


def expected_norm(x_NSC: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool) -> Tensor:
    y_NSC = F.group_norm(x_NSC.transpose(1, 2), groups, weight, bias, eps=1e-5).transpose(1, 2)
    return F.silu(y_NSC) if silu else y_NSC


def expected_geglu(proj: Tensor) -> Tensor:
    hidden, gate = proj.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def assert_agrees(
    run: Callable[..., Tensor],
    expected: Callable[..., Tensor],
    inputs: list[Tensor],
    tolerance: float | None = None,
    grad: Callable[[Tensor], Tensor] = torch.randn_like,
) -> None:
    """The result, and the gradient of every input, against `expected` in float64."""
    dtype = inputs[0].dtype
    found = [tensor.detach().to(DEVICE).requires_grad_() for tensor in inputs]
    wanted = [tensor.detach().double().requires_grad_() for tensor in found]
    ours, exact = run(*found), expected(*wanted)
    assert ours.dtype == dtype and ours.is_contiguous()
    dy = grad(ours)
    pairs = zip(
        [ours, *torch.autograd.grad(ours, found, dy)],
        [exact, *torch.autograd.grad(exact, wanted, dy.double())],
        strict=True,
    )
    for number, (one, other) in enumerate(pairs):
        assert number == 0 or one.dtype == inputs[number - 1].dtype
        error = ((one.double() - other).norm() / other.norm()).item()
        assert error < (tolerance or TOLERANCE[dtype]), (number, error)


def assert_norm(
    x_NSC: Tensor, groups: int, silu: bool = True, weights: torch.dtype | None = None, **options: object
) -> None:
    channels = torch.randn(2, x_NSC.shape[2], dtype=torch.float32).to(weights or x_NSC.dtype)
    assert_agrees(
        lambda x, w, b: group_norm_silu(x, w, b, groups, 1e-5, silu, kernels="triton"),
        lambda x, w, b: expected_norm(x, w, b, groups, silu),
        [x_NSC, *channels],
        **options,
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 300, 20), 2), ((3, 45, 96), 4), ((1, 33, 64), 32), ((9, 3, 12), 4), ((1, 1, 30), 1)],
    ids=["segments", "tiles of channels", "narrow groups", "many units", "one group, one position"],
)
def test_group_norm_agrees_with_float64(shape: tuple[int, int, int], groups: int, dtype: torch.dtype) -> None:
    assert_norm((2 * torch.randn(shape) + 1).to(dtype), groups)


def test_group_norm_without_silu_agrees_with_float64() -> None:
    assert_norm(torch.randn(2, 150, 24), 3, silu=False)


def test_half_precision_inputs_with_float32_weights_agree() -> None:
    assert_norm(torch.randn(2, 40, 24).half(), 3, weights=torch.float32)


@pytest.mark.parametrize("positions", [127, 128, 129, 500])
def test_statistics_of_long_segments_are_combined(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_triton, "MIN_SEGMENT", 32)
    monkeypatch.setattr(fused_triton, "MAX_SEGMENTS", 4)
    monkeypatch.setattr(fused_triton, "COMBINED", 16)  # more segments than are combined at once
    assert_norm(torch.randn(2, positions, 16), 2)


def test_large_means_do_not_cancel() -> None:
    """A mean of squares minus a squared mean would have no digit left."""
    means = torch.tensor([3e4, -3e4]).repeat_interleave(8)
    assert_norm(torch.randn(1, 300, 16) + means, 2, tolerance=1e-2)
    drift = torch.linspace(-100, 100, 300)[:, None]  # segments' means differ far more than their positions
    assert_norm((torch.randn(1, 300, 16) + drift), 2, tolerance=1e-5)


def test_constant_input_gives_the_bias() -> None:
    weight, bias = torch.randn(2, 8, device=DEVICE)
    x = torch.full((1, 50, 8), 7.0, device=DEVICE)
    y = group_norm_silu(x, weight, bias, 2, 1e-5, False, kernels="triton")
    torch.testing.assert_close(y, bias.expand_as(y))


@pytest.mark.parametrize("run", ["norm", "geglu"])
def test_any_memory_order_is_accepted(run: str) -> None:
    transposed = torch.randn(2, 24, 40).transpose(1, 2)
    every_other = lambda y: torch.randn(*y.shape[:-1], 2 * y.shape[-1], device=DEVICE)[..., ::2]  # noqa: E731
    one_number = lambda y: torch.randn((), device=DEVICE).expand_as(y)  # noqa: E731
    for grad in (every_other, one_number):
        if run == "norm":
            # The gradient of x is a small remainder where that of y is the same everywhere.
            assert_norm(transposed, 3, grad=grad, tolerance=1e-5)
        else:
            assert_agrees(lambda p: geglu(p, kernels="triton"), expected_geglu, [transposed], grad=grad)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2, 20, 2 * 130), (1, 2), (35, 2 * 16)], ids=str)
def test_geglu_agrees_with_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_agrees(lambda p: geglu(p, kernels="triton"), expected_geglu, [(3 * torch.randn(shape)).to(dtype)])


def test_geglu_of_large_values_is_accurate_and_finite() -> None:
    gate = torch.tensor([-200.0, -30.0, -6.0, -0.0, 0.0, 6.0, 30.0, 200.0])
    proj = torch.cat([torch.ones(8), gate]).to(DEVICE).requires_grad_()
    y = geglu(proj, kernels="triton")
    torch.testing.assert_close(y.double(), F.gelu(gate.to(DEVICE).double()), rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad(y.sum(), proj)[0].isfinite().all()


def test_only_the_input_and_the_parameters_are_saved_for_backward() -> None:
    """A view of a parameter would keep the memory that ZeRO-3 gathered after it let go of it."""
    x = torch.randn(2, 100, 16, device=DEVICE, requires_grad=True)
    weight, bias = (torch.nn.Parameter(torch.randn(16, device=DEVICE)) for _ in range(2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        group_norm_silu(x, weight, bias, 4, 1e-5, True, kernels="triton")
        geglu(x, kernels="triton")
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() > 100] == 2 * [x.data_ptr()]
    assert any(tensor is weight for tensor in kept) and any(tensor is bias for tensor in kept)


def test_network_is_the_same_with_torch_and_triton_kernels(
    monkeypatch: pytest.MonkeyPatch, unet: UNet
) -> None:
    """Recomputed as by the policy that looks at each operation."""
    monkeypatch.setattr(layers, "NORM_GROUPS", 2)  # the interpreter takes its time for each
    inputs = (torch.randn(1, 2, 8, 4, 4), torch.randn(1), torch.randn(1, 3, 48), torch.rand(1, 3))
    results = {}
    for kernels in ("torch", "triton"):
        network = UNet(replace(SMALL, kernels=kernels))
        network.load_state_dict(unet.state_dict())
        network.to(DEVICE)
        apply_recompute(network, network.blocks(), "attention")
        y = network(*(tensor.to(DEVICE) for tensor in inputs))
        y.square().sum().backward()
        grads = [weight.grad.flatten() for weight in network.parameters() if weight.grad is not None]
        results[kernels] = [y, torch.cat(grads)]
    for torchs, tritons in zip(results["torch"], results["triton"], strict=True):
        assert 0 < ((torchs - tritons).norm() / torchs.norm()).item() < 1e-5
