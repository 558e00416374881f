"""Softmax attention behind one function, whatever kernel computes it.

Layout of queries, keys and values: (..., tokens, heads, head width), last dimension contiguous, any strides
before it. That is how the projections leave them, so nothing is moved before a kernel that reads strides.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from svd_ds.model.ops.fused import triton_installed

MAX_BATCH = 65_535
"""CUDA kernels put the batch on a grid dimension of 16 bits."""
HALF = (torch.float16, torch.bfloat16)
SHORT = 64
"""Up to so many keys, such as a clip's frames, fused kernels mostly pad (docs/benchmarks.md)."""


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(head width)) v.

    q is (batch, tokens, heads, width), k and v (batch, keys, heads, width); the result has q's shape.
    With one more dimension in front, (clips, batch, tokens, heads, width), clips are taken one by one,
    since their strides need not merge with the batch's; the result then lies in memory as (clips, tokens,
    batch, heads, width), which is what attention over time has to hand back.

    Args:
        backend: `flash_attn`, `triton` (a kernel of ours for few tokens), `sdpa` (torch), `short` (two
            batched products, all scores in memory), `reference` (written out), or `auto`. That is, for few
            tokens, triton on a GPU where it is installed, and short on a CPU; for more, flash_attn where it
            is installed and the tensors are half precision on a GPU; else sdpa.

    Raises:
        ValueError: a backend is asked for by name that is not installed, or cannot have such tensors.
    """
    backend = _choose(backend, q, k)
    if backend == "triton":
        from svd_ds.model.ops.attention_triton import short_attention

        return short_attention(q, k, v)
    kernel = KERNELS[backend]
    if q.dim() == 4:
        return _in_chunks(kernel, q, k, v)
    if q.shape[0] == 1:
        return _in_chunks(kernel, q[0], k[0], v[0])[None]
    clips = zip(q.unbind(0), k.unbind(0), v.unbind(0), strict=True)
    return torch.stack([_in_chunks(kernel, *clip).transpose(0, 1) for clip in clips]).transpose(1, 2)


Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def _in_chunks(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.shape[0] <= MAX_BATCH:
        return kernel(q, k, v)
    chunks = zip(q.split(MAX_BATCH), k.split(MAX_BATCH), v.split(MAX_BATCH), strict=True)
    return torch.cat([kernel(*chunk) for chunk in chunks])


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _short(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # In half precision the products would round the scores.
    precise, scale = torch.promote_types(q.dtype, torch.float32), 1 / math.sqrt(q.shape[-1])
    queries, keys, values = (tensor.transpose(1, 2).to(precise) for tensor in (q, k, v))
    weights = ((scale * queries) @ keys.transpose(2, 3)).softmax(dim=-1)
    return (weights @ values).to(q.dtype).transpose(1, 2)


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    precise = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).to(precise) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1).to(v.dtype), v)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


KERNELS: dict[str, Kernel] = {
    "flash_attn": _flash_attn,
    "sdpa": _sdpa,
    "short": _short,
    "reference": _reference,
}
BACKENDS = ("auto", "triton", *KERNELS)


@functools.cache
def flash_attn_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def check_backend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError where a backend is asked for by name that is not installed or cannot run there."""
    installed = {"flash_attn": flash_attn_installed, "triton": triton_installed}
    if backend in installed and not installed[backend]():
        raise ValueError(f"attention is to run on {backend}, which is not installed: choose auto or sdpa")
    if backend == "flash_attn" and (device.type != "cuda" or dtype not in HALF):
        raise ValueError(
            f"attention is to run on flash_attn, which takes half precision on a GPU, not {dtype} on a "
            f"{device.type} device: choose auto or sdpa"
        )


def _choose(backend: str, q: Tensor, k: Tensor) -> str:
    if backend == "auto":
        if not q.is_cuda:
            return "short" if k.shape[-3] <= SHORT else "sdpa"
        if _triton_supports(q, k):
            return "triton"
        return "flash_attn" if q.dtype in HALF and flash_attn_installed() else "sdpa"
    check_backend(backend, q.device, q.dtype)
    if backend == "triton" and not _triton_supports(q, k):
        raise ValueError(
            f"attention is to run on triton, which cannot have {k.shape[-3]} keys for "
            f"{q.shape[-3]} queries in {q.dtype} on {q.device}: choose auto or sdpa"
        )
    return backend


def _triton_supports(q: Tensor, k: Tensor) -> bool:
    if not triton_installed():
        return False
    from svd_ds.model.ops.attention_triton import supports

    return supports(q, k)
