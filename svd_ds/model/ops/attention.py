"""Softmax attention: one function for all kernels.

Queries, keys and values are (..., tokens, heads, head width), with the last dimension contiguous and any
strides otherwise. The projections produce this layout, so a kernel that takes strides needs no copy.
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
"""Largest batch of a kernel: CUDA has 16 bits for that grid dimension."""
HALF = (torch.float16, torch.bfloat16)
MAX_SHORT_KEYS = 64
"""Largest number of keys, such as a clip's frames, for which `auto` avoids the tiles of fused kernels, which
would mostly be padding (docs/benchmarks.md)."""


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """Compute softmax(q k^T / sqrt(head width)) v.

    With a leading dimension, (clips, batch, tokens, heads, width), clips are processed one by one, because
    their strides may not merge with those of the batch. The memory order of the result is then (clips,
    tokens, batch, heads, width), which attention over time needs.

    Args:
        q: queries, (batch, tokens, heads, width).
        k: keys, (batch, keys, heads, width).
        v: values, of the shape of `k`.
        backend: one of BACKENDS: `flash_attn`; `triton` (our kernel for few tokens); `sdpa` (torch); `short`
            (two batched products, all scores in memory); `reference` (the formula); or `auto`. For few tokens
            auto is triton on a GPU, if installed, and short on a CPU; for more it is flash_attn for half
            precision on a GPU, if installed, otherwise sdpa.

    Returns:
        A tensor of q's shape.

    Raises:
        ValueError: the named backend is not installed, or does not support these tensors.
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
    # In half precision the scores would be rounded.
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
"""Values of model.spatial_attention and model.temporal_attention."""


@functools.cache
def flash_attn_installed() -> bool:
    """Return True if flash_attn is installed."""
    return importlib.util.find_spec("flash_attn") is not None


def check_backend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Check that a backend can run.

    Raises:
        ValueError: it is not installed, or cannot run on this device in this dtype.
    """
    installed = {"flash_attn": flash_attn_installed, "triton": triton_installed}
    if backend in installed and not installed[backend]():
        raise ValueError(f"the attention backend is {backend}, which is not installed: choose auto or sdpa")
    if backend == "flash_attn" and (device.type != "cuda" or dtype not in HALF):
        raise ValueError(
            f"the attention backend is flash_attn, which needs half precision on a GPU, not {dtype} on a "
            f"{device.type} device: choose auto or sdpa"
        )


def _choose(backend: str, q: Tensor, k: Tensor) -> str:
    if backend == "auto":
        if not q.is_cuda:
            return "short" if k.shape[-3] <= MAX_SHORT_KEYS else "sdpa"
        if _triton_supports(q, k):
            return "triton"
        return "flash_attn" if q.dtype in HALF and flash_attn_installed() else "sdpa"
    check_backend(backend, q.device, q.dtype)
    if backend == "triton" and not _triton_supports(q, k):
        raise ValueError(
            f"the attention backend is triton, which does not support {k.shape[-3]} keys for "
            f"{q.shape[-3]} queries in {q.dtype} on {q.device}: choose auto or sdpa"
        )
    return backend


def _triton_supports(q: Tensor, k: Tensor) -> bool:
    if not triton_installed():
        return False
    from svd_ds.model.ops.attention_triton import supports

    return supports(q, k)
