"""Operations with their own backward pass: convolution, group norm with SiLU, GEGLU.

All operations have channels as the last dimension, copy no data only to change its order, and save only their
inputs for the backward pass: intermediate results are recomputed.

Convolution: torch can convolve channels_last memory through a permuted view, if the weight has that order,
too; here it is (out, height, width, in). The parameter itself is saved for the backward pass, not a view of
it, because ZeRO-3 could not free a view.

Group norm: torch's own expects channels first. On a GPU it copies channels_last tensors; on a CPU it sums
them sequentially (errors near 1e-5 for a large frame). Here each pass over the activations is one reduction
or one fused multiply-add, in their dtype with float32 inside, and the rest is arithmetic on (N, C). Small
tensors on a CPU are copied, too, because the overhead of starting these operations would dominate.

On a GPU with Triton, group norm and GEGLU of fused_triton.py are used, which take fewer passes; the versions
here run on any device and are the reference in the tests of fused_triton.py.

Shapes: N units (frames or clips), S positions, C channels; a group is C / groups channels; I, O channels in
and out.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL_NUMEL = 2**16
"""Largest number of elements for which a copy and torch's own group norm are faster on a CPU."""
KERNELS = ("auto", "triton", "torch")
"""Kernels of group norm and GEGLU; auto: Triton's on a GPU if Triton is installed, otherwise torch's. float64
always takes torch's."""
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of the Triton kernels."""


@functools.cache
def triton_installed() -> bool:
    """Return True if Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def triton_unavailable(device: torch.device) -> str | None:
    """Return why Triton's kernels cannot run on a device, to follow "which"; None if they can."""
    if not triton_installed():
        return "is not installed"
    from svd_ds.model.ops.kernels import INTERPRETED

    return "needs a GPU, and this is a CPU" if device.type == "cpu" and not INTERPRETED else None


def check_kernels(kernels: str, device: torch.device) -> None:
    """Check that the named kernels can run on a device.

    Raises:
        ValueError: `kernels` is triton, which is not installed or cannot run on the device.
    """
    if kernels == "triton" and (reason := triton_unavailable(device)):
        raise ValueError(f"model.kernels is triton, which {reason}: choose auto or torch")


def _on_triton(kernels: str, x: Tensor) -> bool:
    check_kernels(kernels, x.device)
    if kernels == "auto":
        kernels = "triton" if x.is_cuda and triton_installed() else "torch"
    return kernels == "triton" and x.dtype in TRITON_DTYPES and not x.is_meta


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
) -> Tensor:
    """Convolve over the second and third dimension.

    Args:
        x: (N, H, W, I).
        weight: (O, height, width, I).
        bias: (O,), or None.
        stride: stride of both dimensions.
        padding: zero padding of each dimension.

    Returns:
        (N, H', W', O).
    """
    return _Conv.apply(x, weight, bias, stride, padding)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NHWI: Tensor,
        weight_OHWI: Tensor,
        bias_O: Tensor | None,
        stride: int,
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x_NHWI, weight_OHWI)
        ctx.stride, ctx.padding, ctx.bias_sizes = stride, padding, None if bias_O is None else bias_O.shape
        y_NOHW = F.conv2d(_channels_first(x_NHWI), _channels_first(weight_OHWI), bias_O, stride, padding)
        return _channels_last(y_NOHW)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operands = map(_channels_first, (grads[0], *ctx.saved_tensors))
        window = ([ctx.stride] * 2, ctx.padding, [1, 1], False, [0, 0], 1)
        dx_NIHW, dweight_OIHW, dbias_O = torch.ops.aten.convolution_backward(
            *operands, ctx.bias_sizes, *window, ctx.needs_input_grad[:3]
        )
        dx_NHWI = None if dx_NIHW is None else _channels_last(dx_NIHW)
        dweight_OHWI = None if dweight_OIHW is None else _channels_last(dweight_OIHW)
        return dx_NHWI, dweight_OHWI, dbias_O, None, None


def _channels_first(x_NHWC: Tensor) -> Tensor:
    return x_NHWC.permute(0, 3, 1, 2)


def _channels_last(x_NCHW: Tensor) -> Tensor:
    return x_NCHW.permute(0, 2, 3, 1)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    kernels: str = "auto",
) -> Tensor:
    """Compute silu(group_norm(x)), or group_norm(x) if not `silu`; statistics are float32 or better.

    Args:
        x: (N, S, C).
        weight: (C,).
        bias: (C,).
        groups: number of groups, which divides C.
        eps: term added to the variance.
        silu: apply SiLU.
        kernels: one of KERNELS.

    Returns:
        (N, S, C), in x's dtype.

    Raises:
        ValueError: the kernels cannot run, see `check_kernels`.
    """
    if _on_triton(kernels, x):
        from svd_ds.model.ops.fused_triton import GroupNormSiLU

        return GroupNormSiLU.apply(x, weight, bias, groups, eps, silu)
    if x.is_cpu and x.numel() <= SMALL_NUMEL:
        y_NCS = F.group_norm(x.transpose(1, 2).contiguous(), groups, weight, bias, eps)
        return (F.silu(y_NCS) if silu else y_NCS).transpose(1, 2).contiguous()
    return _GroupNormSiLU.apply(x, weight, bias, groups, eps, silu)


def geglu(proj: Tensor, kernels: str = "auto") -> Tensor:
    """Compute a gelu(b) for proj = [a, b] along the last dimension (arXiv 2002.05202).

    Args:
        proj: (..., 2 H).
        kernels: one of KERNELS.

    Returns:
        (..., H).

    Raises:
        ValueError: the kernels cannot run, see `check_kernels`.
    """
    if _on_triton(kernels, proj):
        from svd_ds.model.ops.fused_triton import GEGLU

        return GEGLU.apply(proj)
    return _GEGLU.apply(proj)


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, proj: Tensor) -> Tensor:
        ctx.save_for_backward(proj)
        hidden, gate = _halves(proj)
        return F.gelu(gate).mul_(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (proj,) = ctx.saved_tensors
        hidden, gate = _halves(proj)
        dproj = torch.empty_like(proj)
        dhidden, dgate = dproj.chunk(2, dim=-1)
        torch.mul(grads[0], F.gelu(gate), out=dhidden)
        if gate.is_contiguous():
            dgate.copy_(torch.ops.aten.gelu_backward(grads[0] * hidden, gate))
        else:
            torch.ops.aten.gelu_backward.grad_input(grads[0] * hidden, gate, grad_input=dgate)
        return dproj


def _halves(proj: Tensor) -> tuple[Tensor, Tensor]:
    """Split a projection into the hidden half and the gate, with the gate in the layout that gelu is fast
    on."""
    hidden, gate = proj.chunk(2, dim=-1)
    # oneDNN computes gelu in bfloat16, several times as fast as torch, but only from contiguous memory.
    return hidden, gate.contiguous() if gate.is_cpu and gate.dtype == torch.bfloat16 else gate


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NSC: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        mean_N1C = _group_mean(_sum(x_NSC), groups) / x_NSC.shape[1]
        rstd_N1C = (_variance(x_NSC, mean_N1C, groups) + eps).rsqrt()
        ctx.save_for_backward(x_NSC, weight_C, bias_C, mean_N1C, rstd_N1C)
        ctx.groups, ctx.silu = groups, silu
        y_NSC = _normed(x_NSC, weight_C, bias_C, mean_N1C, rstd_N1C)
        return F.silu(y_NSC, inplace=True) if silu else y_NSC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NSC, weight_C, bias_C, mean_N1C, rstd_N1C = ctx.saved_tensors
        dy_NSC = grads[0]
        if ctx.silu:
            y_NSC = _normed(x_NSC, weight_C, bias_C, mean_N1C, rstd_N1C)
            dy_NSC = torch.ops.aten.silu_backward(dy_NSC, y_NSC)
        # With y = weight n + bias, n = (x - mean) rstd, and <.> the average over a group's positions and
        # channels: dx = rstd (weight dy - <weight dy> - n <weight dy n>).
        sum_dy_N1C = _sum(dy_NSC)
        sum_dy_n_N1C = _sum(dy_NSC * (x_NSC - mean_N1C)) * rstd_N1C
        scale_N1C = rstd_N1C / x_NSC.shape[1]
        per_one_N1C = _group_mean(weight_C * sum_dy_N1C, ctx.groups) * scale_N1C
        per_x_N1C = _group_mean(weight_C * sum_dy_n_N1C, ctx.groups) * scale_N1C * rstd_N1C
        dx_NSC = _multiply_add(x_NSC, -per_x_N1C, per_x_N1C * mean_N1C - per_one_N1C)
        dx_NSC.addcmul_(dy_NSC, rstd_N1C * weight_C)
        dweight_C = sum_dy_n_N1C.sum((0, 1)).to(weight_C.dtype)
        dbias_C = sum_dy_N1C.sum((0, 1)).to(bias_C.dtype)
        return dx_NSC, dweight_C, dbias_C, None, None, None


def _variance(x_NSC: Tensor, mean_N1C: Tensor, groups: int) -> Tensor:
    if x_NSC.dtype in (torch.float16, torch.bfloat16):
        # One pass that writes nothing. Its cancellation error is far below the resolution of half precision.
        squares_N1C = torch.linalg.vector_norm(x_NSC, dim=1, keepdim=True, dtype=torch.float32).square()
        mean_square_N1C = _group_mean(squares_N1C, groups) / x_NSC.shape[1]
        return (mean_square_N1C - mean_N1C.square()).clamp_(min=0)
    return _group_mean(_sum((x_NSC - mean_N1C).square_()), groups) / x_NSC.shape[1]


def _normed(x_NSC: Tensor, weight_C: Tensor, bias_C: Tensor, mean_N1C: Tensor, rstd_N1C: Tensor) -> Tensor:
    scale_N1C = rstd_N1C * weight_C
    return _multiply_add(x_NSC, scale_N1C, bias_C - mean_N1C * scale_N1C)


def _multiply_add(x_NSC: Tensor, scale_N1C: Tensor, shift_N1C: Tensor) -> Tensor:
    """Compute x scale + shift in one pass, rounded once to x's dtype."""
    return torch.addcmul(shift_N1C, x_NSC, scale_N1C, out=torch.empty_like(x_NSC))


def _sum(values_NSC: Tensor) -> Tensor:
    """Sum over positions: (N, 1, C), float32 or better."""
    return values_NSC.sum(1, keepdim=True, dtype=torch.promote_types(values_NSC.dtype, torch.float32))


def _group_mean(values_N1C: Tensor, groups: int) -> Tensor:
    """Replace each channel by the mean of its group."""
    values_N1GD = values_N1C.unflatten(2, (groups, -1))
    return values_N1GD.mean(-1, keepdim=True).expand_as(values_N1GD).flatten(2)
