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


def short_attention(qkv: Tensor) -> Tensor:
    """Compute `attention.self_attention` of tensors for which `supports` is true."""
    if qkv.dim() == 5:
        return _Attention.apply(qkv[:, None])[:, 0]
    return _Attention.apply(qkv)


class _Attention(torch.autograd.Function):
    """Attention of (clips, units, tokens, 3, heads, width); in the memory of results, tokens come before
    units. The gradient is one tensor in the memory order of the input: three apart would be joined by another
    pass over them."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        if qkv.stride(-1) != 1:
            qkv = qkv.contiguous()
        ctx.save_for_backward(qkv)
        clips, units, tokens, _, heads, width = qkv.shape
        out = qkv.new_empty(clips, tokens, units, heads, width).transpose(1, 2)
        q, k, v = qkv.unbind(3)
        # Triton launches kernels on the current device, which may differ from the tensors'.
        with torch.cuda.device_of(qkv):
            attend[(clips * units * heads,)](q, k, v, out, *_layout(q, out), **_tile(q))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (qkv,) = ctx.saved_tensors
        dqkv = torch.empty_like(qkv)
        if dqkv.stride() != qkv.stride():  # parts of a larger tensor
            qkv = qkv.contiguous()
            dqkv = torch.empty_like(qkv)
        dout = grads[0].transpose(1, 2).contiguous().transpose(1, 2)
        q, k, v = qkv.unbind(3)
        clips, units, _, heads, _ = q.shape
        with torch.cuda.device_of(qkv):
            attend_backward[(clips * units * heads,)](
                q, k, v, dout, *dqkv.unbind(3), *_layout(q, dout), **_tile(q)
            )
        return dqkv


def _layout(inputs: Tensor, results: Tensor) -> tuple[int | float, ...]:
    _, units, tokens, heads, width = inputs.shape
    return (*inputs.stride()[:-1], *results.stride()[:-1], units, heads, tokens, width**-0.5)


def _tile(q: Tensor) -> dict[str, Any]:
    tokens = max(MIN_TILE, next_power_of_two(q.shape[2]))
    # Enough warps for all of it to fit the registers.
    warps = tokens // MIN_TILE * q.element_size() // 2
    return {"TOKENS": tokens, "WIDTH": q.shape[-1], "num_warps": warps, **OPTIONS}
