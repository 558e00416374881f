"""Attention among few tokens, such as a pixel's frames, by a Triton kernel.

Flash attention processes tiles of 64 or 128 queries, which 14 frames would leave mostly empty. Here a program
takes all tokens of one unit (a pixel) and head at once: only the inputs are kept for the backward pass, and
forward and backward are one pass over memory each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svd_ds.model.ops.fused import TRITON_DTYPES
from svd_ds.model.ops.fused_triton import OPTIONS, next_power_of_two
from svd_ds.model.ops.kernels import INTERPRETED, attend, attend_backward

MAX_TOKENS = 64
"""Largest number of tokens: all scores of a program are in registers."""
HEAD_WIDTHS = (16, 32, 64, 128)
"""Head widths for which there is a kernel."""
MIN_TILE = 16
"""Smallest tile of the GPU's matrix units: fewer tokens are padded."""


def supports(q: Tensor, k: Tensor) -> bool:
    """Return True if there is a kernel for these queries and keys."""
    runs = (q.is_cuda or INTERPRETED) and q.dtype in TRITON_DTYPES
    return runs and q.shape == k.shape and q.shape[-3] <= MAX_TOKENS and q.shape[-1] in HEAD_WIDTHS


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute `attention.attention` of tensors for which `supports` is true."""
    if q.dim() == 4:
        return _Attention.apply(q[:, None], k[:, None], v[:, None])[:, 0]
    return _Attention.apply(q, k, v)


class _Attention(torch.autograd.Function):
    """Attention of (clips, units, tokens, heads, width); in the memory of results, tokens come before
    units."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.stride() == k.stride() == v.stride() or q.stride(-1) != 1:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        ctx.save_for_backward(q, k, v)
        clips, units, tokens, heads, width = q.shape
        out = q.new_empty(clips, tokens, units, heads, width).transpose(1, 2)
        # Triton launches kernels on the current device, which may differ from the tensors'.
        with torch.cuda.device_of(q):
            attend[(clips * units * heads,)](q, k, v, out, *_layout(q, out), **_tile(q))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        dout = grads[0].transpose(1, 2).contiguous().transpose(1, 2)
        dq, dk, dv = (torch.empty_like(dout) for _ in range(3))
        clips, units, _, heads, _ = q.shape
        with torch.cuda.device_of(q):
            attend_backward[(clips * units * heads,)](
                q, k, v, dout, dq, dk, dv, *_layout(q, dout), **_tile(q)
            )
        return dq, dk, dv


def _layout(inputs: Tensor, results: Tensor) -> tuple[int | float, ...]:
    _, units, tokens, heads, width = inputs.shape
    return (*inputs.stride()[:-1], *results.stride()[:-1], units, heads, tokens, width**-0.5)


def _tile(q: Tensor) -> dict[str, Any]:
    tokens = max(MIN_TILE, next_power_of_two(q.shape[2]))
    # Enough warps for all of it to fit the registers.
    warps = tokens // MIN_TILE * q.element_size() // 2
    return {"TOKENS": tokens, "WIDTH": q.shape[-1], "num_warps": warps, **OPTIONS}
