"""Group norm with SiLU and GEGLU of fused.py, each pass over the activations as one Triton kernel.

Group norm reads the activations twice and writes them once; its backward pass reads them and their gradient
twice and writes once. The tiling of a tensor depends on its shape alone, so that the same input gives the
same bits on any number of GPUs.

Shapes: N units (frames or clips), S positions, C channels, G groups; P segments of positions, of all units.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from svd_ds.model.ops.kernels import (
    combine_gradient_sums,
    combine_statistics,
    geglu_kernel,
    gradient_sums,
    norm_backward,
    normalise,
    statistics,
)

OPTIONS = {"enable_fp_fusion": True}
"""Compiler options; the compiler's default for multiply-add depends on its version."""
TILE = {"ROWS": 32, "COLUMNS": 64, **OPTIONS}
"""Positions and channels that a program of the group norm reads at once: 128 bytes a row in half precision, a
divisor of all widths of the released network, and 16 numbers a thread, so that four tiles fit the
registers."""
GATE_TILE = {"ROWS": 16, "COLUMNS": 128, **OPTIONS}
"""Positions and channels that a program of GEGLU reads at once."""
MIN_SEGMENT = 128
"""Smallest number of positions of a segment: a program then writes a few hundredths of what it reads."""
MAX_SEGMENTS = 512
"""Largest number of segments of a unit: more would not make a GPU busier, and would be more to combine."""
COMBINED = 2048
"""Numbers that a combining program reads at once."""


class _Tiling:
    """Tiling of a tensor by the kernels of the group norm, and their buffers."""

    def __init__(self, x_NSC: Tensor, groups: int) -> None:
        units, positions, channels = x_NSC.shape
        length = max(MIN_SEGMENT, TILE["ROWS"] * math.ceil(positions / (MAX_SEGMENTS * TILE["ROWS"])))
        segments = units * math.ceil(positions / length)
        width = next_power_of_two(channels // groups)
        self.sizes = (positions, channels, groups, length)
        self.programs = (segments * math.ceil(channels / TILE["COLUMNS"]),)
        self.group_programs = (units * groups,)
        self.group_options = {"PARTS": max(COMBINED // width, 1), "WIDTH": width, **OPTIONS}
        # Buffers for two numbers each.
        self.partial_2PC = x_NSC.new_empty(2, segments, channels, dtype=torch.float32)
        self.per_group_2NG = x_NSC.new_empty(2, units, groups, dtype=torch.float32)


def next_power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


class GroupNormSiLU(torch.autograd.Function):
    """Autograd function of fused.group_norm_silu, for x in float32 or half precision."""

    @staticmethod
    def forward(
        ctx: Any, x_NSC: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        """Compute the result, and keep the inputs."""
        assert weight_C.is_contiguous() and bias_C.is_contiguous()
        x_NSC = x_NSC.contiguous()
        y_NSC, tiling = torch.empty_like(x_NSC), _Tiling(x_NSC, groups)
        partial_2PC, statistics_2NG = tiling.partial_2PC, tiling.per_group_2NG
        # Triton launches kernels on the current device, which may differ from the tensors'.
        with torch.cuda.device_of(x_NSC):
            statistics[tiling.programs](x_NSC, *partial_2PC, *tiling.sizes, **TILE)
            combine_statistics[tiling.group_programs](
                *partial_2PC, *statistics_2NG, *tiling.sizes, eps, **tiling.group_options
            )
            normalise[tiling.programs](
                x_NSC, weight_C, bias_C, *statistics_2NG, y_NSC, *tiling.sizes, silu, **TILE
            )
        ctx.save_for_backward(x_NSC, weight_C, bias_C, statistics_2NG)
        ctx.groups, ctx.silu = groups, silu
        return y_NSC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the inputs."""
        x_NSC, weight_C, bias_C, statistics_2NG = ctx.saved_tensors
        inputs = (x_NSC, grads[0].contiguous(), weight_C, bias_C, *statistics_2NG)
        dx_NSC, tiling = torch.empty_like(x_NSC), _Tiling(x_NSC, ctx.groups)
        partial_2PC, averages_2NG = tiling.partial_2PC, tiling.per_group_2NG
        sums_2NC = partial_2PC.new_empty(2, x_NSC.shape[0], x_NSC.shape[2])
        with torch.cuda.device_of(x_NSC):
            gradient_sums[tiling.programs](*inputs, *partial_2PC, *tiling.sizes, ctx.silu, **TILE)
            combine_gradient_sums[tiling.group_programs](
                *partial_2PC, weight_C, *sums_2NC, *averages_2NG, *tiling.sizes, **tiling.group_options
            )
            norm_backward[tiling.programs](*inputs, *averages_2NG, dx_NSC, *tiling.sizes, ctx.silu, **TILE)
        dbias_C, dweight_C = sums_2NC.sum(1)
        return dx_NSC, dweight_C.to(weight_C.dtype), dbias_C.to(bias_C.dtype), None, None, None


class GEGLU(torch.autograd.Function):
    """Autograd function of fused.geglu, for projections in float32 or half precision."""

    @staticmethod
    def forward(ctx: Any, proj: Tensor) -> Tensor:
        """Compute the result, and keep the inputs."""
        proj = proj.contiguous()
        ctx.save_for_backward(proj)
        y = proj.new_empty(*proj.shape[:-1], proj.shape[-1] // 2)
        _launch_geglu(proj, y, y, backward=False)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Compute the gradients of the inputs."""
        (proj,) = ctx.saved_tensors
        dproj = torch.empty_like(proj)
        _launch_geglu(proj, grads[0].contiguous(), dproj, backward=True)
        return dproj


def _launch_geglu(proj: Tensor, dy: Tensor, out: Tensor, backward: bool) -> None:
    width = dy.shape[-1]
    rows = dy.numel() // width
    programs = math.ceil(rows / GATE_TILE["ROWS"]) * math.ceil(width / GATE_TILE["COLUMNS"])
    with torch.cuda.device_of(proj):
        geglu_kernel[(programs,)](proj, dy, out, rows, width, backward, **GATE_TILE)
