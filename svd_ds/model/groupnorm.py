"""Group norm with the SiLU that follows it, on memory whose last dimension is the channels.

torch's own group norm either wants channels first or, on a CPU, sums channels_last tensors one by one
(errors near 1e-5 for a large frame). Here the sums over positions are torch reductions, the variance is
that of centred values, and all else is arithmetic on (N, C). The backward pass computes the normed values
again from the input, so neither they nor the SiLU's input are kept.

Shapes: N normed units (frames or clips), S positions, C channels; a group is C / groups channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x_NSC: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """silu(group_norm(x)), or group_norm(x) alone, in x's dtype; the arithmetic is float32 or better."""
    return _GroupNormSiLU.apply(x_NSC, weight_C, bias_C, groups, eps, silu)


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NSC: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        mean_N1C = _group_mean(_sum(x_NSC), groups) / x_NSC.shape[1]
        centred_NSC = x_NSC - mean_N1C
        variance_N1C = _group_mean(_sum(centred_NSC.square()), groups) / x_NSC.shape[1]
        rstd_N1C = (variance_N1C + eps).rsqrt()
        ctx.save_for_backward(x_NSC, weight_C, bias_C, mean_N1C, rstd_N1C)
        ctx.groups, ctx.silu = groups, silu
        y_NSC = centred_NSC.mul_(rstd_N1C * weight_C).add_(bias_C)
        return (F.silu(y_NSC, inplace=True) if silu else y_NSC).to(x_NSC.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NSC, weight_C, bias_C, mean_N1C, rstd_N1C = ctx.saved_tensors
        dy_NSC = grads[0]
        normed_NSC = (x_NSC - mean_N1C).mul_(rstd_N1C)
        if ctx.silu:
            y_NSC = torch.addcmul(bias_C.to(normed_NSC.dtype), normed_NSC, weight_C.to(normed_NSC.dtype))
            dy_NSC = torch.ops.aten.silu_backward(dy_NSC.to(y_NSC.dtype), y_NSC)
        # With y = weight n + bias, n = (x - mean) rstd, and <.> the average over a group's positions and
        # channels: dx = rstd (weight dy - <weight dy> - n <weight dy n>).
        sum_dy_N1C = _sum(dy_NSC)
        sum_dy_n_N1C = _sum(dy_NSC * normed_NSC)
        scale = rstd_N1C / x_NSC.shape[1]
        per_one_N1C = _group_mean(weight_C * sum_dy_N1C, ctx.groups) * scale
        per_n_N1C = _group_mean(weight_C * sum_dy_n_N1C, ctx.groups) * scale
        dx_NSC = normed_NSC.mul_(-per_n_N1C).sub_(per_one_N1C).addcmul_(dy_NSC, rstd_N1C * weight_C)
        dweight_C = sum_dy_n_N1C.sum((0, 1)).to(weight_C.dtype)
        dbias_C = sum_dy_N1C.sum((0, 1)).to(bias_C.dtype)
        return dx_NSC.to(x_NSC.dtype), dweight_C, dbias_C, None, None, None


def _sum(values_NSC: Tensor) -> Tensor:
    """The sum over positions, (N, 1, C), float32 or better."""
    return values_NSC.sum(1, keepdim=True, dtype=torch.promote_types(values_NSC.dtype, torch.float32))


def _group_mean(values_N1C: Tensor, groups: int) -> Tensor:
    """The mean of each group's channels, at each of them."""
    values_N1GD = values_N1C.unflatten(2, (groups, -1))
    return values_N1GD.mean(-1, keepdim=True).expand_as(values_N1GD).flatten(2)
