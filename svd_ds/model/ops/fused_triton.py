"""fused.py's group norm with SiLU, and GEGLU, with each pass over the activations one Triton kernel.

Group norm reads the activations twice and writes them once; its backward pass reads them and their gradient
twice and writes once. How a tensor is cut up depends on its shape alone, so that the same input gives the
same bits on any number of GPUs.

Shapes: N units (frames or clips), S positions, C channels, G groups; P stretches of positions, of all units.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from svd_ds.model.ops.kernels import (
    gate_halves,
    gradient_sums,
    join_gradient_sums,
    join_statistics,
    normalise,
    statistics,
    through_norm,
)

OPTIONS = {"enable_fp_fusion": True}
"""Of the compiler, whose default for multiply-add depends on its version."""
TILE = {"ROWS": 32, "COLUMNS": 64, **OPTIONS}
"""Positions and channels that a program reads at once: 128 bytes a row in half precision, a divisor of all
widths of the released network, and 16 numbers a thread, so that four tiles fit the registers."""
GATE_TILE = {"ROWS": 16, "COLUMNS": 128, **OPTIONS}
"""The same for GEGLU."""
STRETCH = 128
"""Positions a program takes at least: what it writes is then a few hundredths of what it reads."""
MOST_STRETCHES = 512
"""Of one unit: more would not make a GPU busier, and would be more to join."""
JOINED = 2048
"""Numbers that a joining program reads at once."""


class _Cut:
    """How the kernels of the group norm cut up a tensor."""

    def __init__(self, x_NSC: Tensor, groups: int) -> None:
        units, positions, channels = x_NSC.shape
        length = max(STRETCH, TILE["ROWS"] * math.ceil(positions / (MOST_STRETCHES * TILE["ROWS"])))
        stretches = units * math.ceil(positions / length)
        width = next_power_of_two(channels // groups)
        self.sizes = (positions, channels, groups, length)
        self.programs = (stretches * math.ceil(channels / TILE["COLUMNS"]),)
        self.joiners = (units * groups,)
        self.joined = {"PARTS": max(JOINED // width, 1), "WIDTH": width, **OPTIONS}
        # Two numbers for each, to be filled.
        self.partial_2PC = x_NSC.new_empty(2, stretches, channels, dtype=torch.float32)
        self.per_group_2NG = x_NSC.new_empty(2, units, groups, dtype=torch.float32)


def next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


class GroupNormSiLU(torch.autograd.Function):
    """fused.group_norm_silu, for x in float32 or half precision."""

    @staticmethod
    def forward(
        ctx: Any, x_NSC: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        assert weight_C.is_contiguous() and bias_C.is_contiguous()
        x_NSC = x_NSC.contiguous()
        y_NSC, cut = torch.empty_like(x_NSC), _Cut(x_NSC, groups)
        partial_2PC, statistics_2NG = cut.partial_2PC, cut.per_group_2NG
        # Triton starts kernels on the current device, which need not be the tensors'.
        with torch.cuda.device_of(x_NSC):
            statistics[cut.programs](x_NSC, *partial_2PC, *cut.sizes, **TILE)
            join_statistics[cut.joiners](*partial_2PC, *statistics_2NG, *cut.sizes, eps, **cut.joined)
            normalise[cut.programs](x_NSC, weight_C, bias_C, *statistics_2NG, y_NSC, *cut.sizes, silu, **TILE)
        ctx.save_for_backward(x_NSC, weight_C, bias_C, statistics_2NG)
        ctx.groups, ctx.silu = groups, silu
        return y_NSC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NSC, weight_C, bias_C, statistics_2NG = ctx.saved_tensors
        inputs = (x_NSC, grads[0].contiguous(), weight_C, bias_C, *statistics_2NG)
        dx_NSC, cut = torch.empty_like(x_NSC), _Cut(x_NSC, ctx.groups)
        partial_2PC, averages_2NG = cut.partial_2PC, cut.per_group_2NG
        sums_2NC = partial_2PC.new_empty(2, x_NSC.shape[0], x_NSC.shape[2])
        with torch.cuda.device_of(x_NSC):
            gradient_sums[cut.programs](*inputs, *partial_2PC, *cut.sizes, ctx.silu, **TILE)
            join_gradient_sums[cut.joiners](
                *partial_2PC, weight_C, *sums_2NC, *averages_2NG, *cut.sizes, **cut.joined
            )
            through_norm[cut.programs](*inputs, *averages_2NG, dx_NSC, *cut.sizes, ctx.silu, **TILE)
        dbias_C, dweight_C = sums_2NC.sum(1)
        return dx_NSC, dweight_C.to(weight_C.dtype), dbias_C.to(bias_C.dtype), None, None, None


class GEGLU(torch.autograd.Function):
    """fused.geglu, for projections in float32 or half precision."""

    @staticmethod
    def forward(ctx: Any, proj: Tensor) -> Tensor:
        proj = proj.contiguous()
        ctx.save_for_backward(proj)
        y = proj.new_empty(*proj.shape[:-1], proj.shape[-1] // 2)
        _start_gate(proj, y, y, backward=False)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (proj,) = ctx.saved_tensors
        dproj = torch.empty_like(proj)
        _start_gate(proj, grads[0].contiguous(), dproj, backward=True)
        return dproj


def _start_gate(proj: Tensor, dy: Tensor, out: Tensor, backward: bool) -> None:
    width = dy.shape[-1]
    rows = dy.numel() // width
    programs = math.ceil(rows / GATE_TILE["ROWS"]) * math.ceil(width / GATE_TILE["COLUMNS"])
    with torch.cuda.device_of(proj):
        gate_halves[(programs,)](proj, dy, out, rows, width, backward, **GATE_TILE)
