"""Softmax attention: one function for all kernels.

Queries, keys and values are (..., tokens, heads, head width), with the last dimension contiguous and any
strides otherwise. The projections produce this layout, so a kernel that takes strides needs no copy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from svd_ds.model.ops.fused import triton_installed, triton_unavailable

MAX_BATCH = 65_535
"""Largest batch of a kernel: CUDA has 16 bits for that grid dimension."""
HALF = (torch.float16, torch.bfloat16)
MAX_SHORT_KEYS = 64
"""Largest number of keys, such as a clip's frames, for which `auto` avoids the tiles of fused kernels, which
would mostly be padding (docs/benchmarks.md)."""
Backend = str | tuple[str, ...]
"""One of BACKENDS, or several, of which the first that supports the tensors is used."""


def attention(q: Tensor, k: Tensor, v: Tensor, backend: Backend = "auto") -> Tensor:
    """Compute softmax(q k^T / sqrt(head width)) v.

    With a leading dimension, (clips, batch, tokens, heads, width), clips are processed one by one, because
    their strides may not merge with those of the batch. The memory order of the result is then (clips,
    tokens, batch, heads, width), which attention over time needs.

    Args:
        q: queries, (batch, tokens, heads, width).
        k: keys, (batch, keys, heads, width).
        v: values, of the shape of `k`.
        backend: `flash_attn` (FlashAttention-2), `flash_attn_3` (FlashAttention-3, for Hopper GPUs); `triton`
            (our kernel for few tokens); `sdpa` (torch); `short` (two batched products, all scores in memory);
            `reference` (the formula); a tuple of these, of which the first that supports the tensors is used;
            or `auto`, see AUTO.

    Returns:
        A tensor of q's shape.

    Raises:
        ValueError: the named backend cannot be imported, or does not support these tensors.
    """
    name = _choose(backend, q, k)
    if name == "triton":
        from svd_ds.model.ops.attention_triton import short_attention

        return short_attention(torch.stack([q, k, v], dim=-3))
    return _attend(name, q, k, v)


def self_attention(qkv: Tensor, backend: Backend = "auto") -> Tensor:
    """Compute `attention` of the queries, keys and values of one projection, without a copy of them.

    Args:
        qkv: (batch, tokens, 3, heads, width), with a leading dimension for clips or without.
        backend: see `attention`.

    Returns:
        (batch, tokens, heads, width), with the leading dimension of `qkv`.
    """
    q, k, v = qkv.unbind(-3)
    name = _choose(backend, q, k)
    if name == "triton":
        from svd_ds.model.ops.attention_triton import short_attention

        return short_attention(qkv)
    return _attend(name, q, k, v)


def _attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    kernel = KERNELS[name]
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


@functools.cache
def import_flash(backend: str) -> Callable[..., Tensor | tuple[Tensor, ...]] | Exception:
    """Import the function of `flash_attn` or `flash_attn_3`, once.

    Returns:
        The function, or the exception that its import raises: a wheel for another torch, or a package of the
        same name without the function, is found by nothing but its import.
    """
    try:
        if backend == "flash_attn":
            from flash_attn import flash_attn_func
        else:
            from flash_attn_interface import flash_attn_func
    except Exception as error:
        return error
    return flash_attn_func


def _flash(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    function = import_flash(backend)
    assert not isinstance(function, Exception), "_choose has checked it"
    result = function(q, k, v, deterministic=torch.are_deterministic_algorithms_enabled())
    # Older releases of FlashAttention-3 return the log-sum-exp, too.
    return result[0] if isinstance(result, tuple) else result


FLASH = ("flash_attn", "flash_attn_3")
KERNELS: dict[str, Kernel] = {
    **{name: functools.partial(_flash, name) for name in FLASH},
    "sdpa": _sdpa,
    "short": _short,
    "reference": _reference,
}
BACKENDS = ("auto", "triton", *KERNELS)
"""Values of model.spatial_attention and model.temporal_attention."""
AUTO = {"cuda": ("triton", "sdpa"), "cpu": ("short", "sdpa")}
"""Type of the device -> backends of `auto`. On GPUs, trial.py extends and shortens the list at the start of a
run."""


def unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a backend cannot run on a device in a dtype, to follow "which"; None if it can."""
    if backend == "triton":
        return triton_unavailable(device)
    if backend not in FLASH:
        return None
    if isinstance(error := import_flash(backend), Exception):
        return f"cannot be imported ({type(error).__name__}: {error})"
    if device.type != "cuda" or dtype not in HALF:
        return f"needs half precision on a GPU, not {dtype} on a {device.type} device"
    return None


def _choose(backend: Backend, q: Tensor, k: Tensor) -> str:
    if backend == "auto":
        backend = AUTO["cuda" if q.is_cuda else "cpu"]
    if isinstance(backend, tuple):
        return next(name for name in backend if _supports(name, q, k))
    if reason := unavailable(backend, q.device, q.dtype):
        raise ValueError(f"the attention backend is {backend}, which {reason}: choose auto or sdpa")
    if backend == "triton" and not _triton_supports(q, k):
        raise ValueError(
            f"the attention backend is triton, which does not support {k.shape[-3]} keys for "
            f"{q.shape[-3]} queries in {q.dtype} on {q.device}: choose auto or sdpa"
        )
    return backend


def _supports(name: str, q: Tensor, k: Tensor) -> bool:
    if name == "triton":
        return _triton_supports(q, k)
    if name == "short":
        return k.shape[-3] <= MAX_SHORT_KEYS
    return name not in FLASH or q.dtype in HALF


def _triton_supports(q: Tensor, k: Tensor) -> bool:
    if not triton_installed():
        return False
    from svd_ds.model.ops.attention_triton import supports

    return supports(q, k)
