"""Layers that the spatial and the temporal blocks share.

Activations inside the UNet are (B, T, h, w, C), contiguous: B clips, T frames, h x w latent pixels, C
channels. No layer copies data only to change its order: convolutions and norms read this memory layout
(ops/fused.py).

Initial values are torch's defaults, except for AlphaBlender, the mask embedding, and the layers named
Zero..., which start at zero as in the public code (sgm `zero_module`). Each layer sets its own parameters in
its own constructor: DeepSpeed's zero.Init partitions a parameter as soon as that constructor returns.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svd_ds.model.ops.attention import Backend, attention, self_attention
from svd_ds.model.ops.fused import conv, geglu, group_norm_silu

NORM_GROUPS = 32
"""Groups of every group norm."""


class _Conv(nn.Module):
    """Weight, (out, height, width, in), and bias of a 2-D convolution, initialised as torch does."""

    def __init__(self, in_channels: int, out_channels: int, height: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, height, width, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)


class FrameConv(_Conv):
    """3 x 3 convolution of every frame, keeping the size at stride 1 and halving it at stride 2."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, 3)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y_NhwC = conv(x.flatten(0, 1), self.weight, self.bias, self.stride, padding=(1, 1))
        return y_NhwC.unflatten(0, x.shape[:2])


class TemporalConv(_Conv):
    """Convolution over three neighbouring frames of each pixel, with zero padding at the clip's ends.

    The public code has a 3-D convolution with the kernel 3 x 1 x 1. On the plane (T, h * w) it is a 2-D
    convolution with the kernel 3 x 1, which is faster on a CPU.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y_BTSC = conv(x.flatten(2, 3), self.weight, self.bias, padding=(1, 0))
        return y_BTSC.unflatten(2, x.shape[2:4])


class Linear(nn.Linear):
    """Linear layer over the last dimension.

    For many rows of float32 on a CPU it runs as oneDNN's 1 x 1 convolution of a batch of 16, which can be
    faster than torch's BLAS call; for few rows it would be slower.
    """

    BATCH, MIN_ROWS = 16, 512

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to (..., in)."""
        rows = x.shape[:-1].numel()
        if not x.is_cpu or x.dtype != torch.float32 or rows % self.BATCH or rows < self.MIN_ROWS:
            return super().forward(x)
        y_NhwC = conv(x.reshape(self.BATCH, -1, 1, x.shape[-1]), self.weight[:, None, None], self.bias)
        return y_NhwC.view(*x.shape[:-1], -1)


class _ZeroInit(nn.Module):
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class ZeroFrameConv(_ZeroInit, FrameConv):
    """FrameConv initialised to zero."""


class ZeroTemporalConv(_ZeroInit, TemporalConv):
    """TemporalConv initialised to zero."""


class ZeroLinear(_ZeroInit, Linear):
    """Linear layer initialised to zero."""


class _GroupNorm(nn.GroupNorm):
    """Group norm over all but the first dimension, channels last, then SiLU (if `silu`)."""

    kernels = "auto"

    def __init__(self, channels: int, eps: float, silu: bool = True) -> None:
        super().__init__(NORM_GROUPS, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        y_NSC = group_norm_silu(
            x.flatten(1, -2), self.weight, self.bias, self.num_groups, self.eps, self.silu, self.kernels
        )
        return y_NSC.view(x.shape)


class FrameGroupNorm(_GroupNorm):
    """Group norm with the statistics of each frame, over h x w, then SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).view(x.shape)


class VideoGroupNorm(_GroupNorm):
    """Group norm with the statistics of each clip, over T x h x w, then SiLU."""


def sinusoidal_embedding(values: Tensor, width: int) -> Tensor:
    """Embed numbers as cosines, then sines, at width / 2 frequencies from 1 to 1 / 10000 (sgm
    `timestep_embedding`).

    Args:
        values: any shape, (...).
        width: an even number.

    Returns:
        (..., width), float32.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / half
    frequencies = torch.exp(-math.log(10_000) * exponents)
    angles = values.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class EmbeddingMLP(nn.Module):
    """MLP of an embedding: linear, SiLU, linear."""

    def __init__(self, in_width: int, hidden_width: int, out_width: int) -> None:
        super().__init__()
        self.linear1 = Linear(in_width, hidden_width)
        self.linear2 = Linear(hidden_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.silu(self.linear1(x.to(self.linear1.weight.dtype))))


class MaskEmbedding(_ZeroInit):
    """Learned embedding m that replaces the latents of frames that are not given (arXiv 2311.15127 D.5).

    It has one number a channel, the same at every pixel. The paper's m has the shape of the latents, which
    would fix the size of the clips; convolutions with padding already know positions.
    """

    tag = "condition"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Insert the embedding.

        Args:
            x: (B, T, C, h, w). The last channels are the latents of the given frames, then the mask, which is
                1 for a given frame.
        """
        channels = len(self.weight)
        noisy, given, mask = x.split([x.shape[2] - channels - 1, channels, 1], dim=2)
        return torch.cat([noisy, torch.where(mask == 1, given, self.weight[:, None, None]), mask], dim=2)


class AlphaBlender(nn.Module):
    """Learned share alpha = sigmoid(mix_factor) of the spatial path in alpha z + (1 - alpha) z' (VideoLDM,
    arXiv 2304.08818 section 3.1).

    alpha is 1 for an independent image, which recovers the image model (sgm's merge strategy
    `learned_with_images`).
    """

    tag = "temporal"

    def __init__(self) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.mix_factor, 0.5)

    def forward(self, image_only: Tensor | None) -> Tensor:
        """Return alpha, which broadcasts over (B, T, h, w, C)."""
        alpha = self.mix_factor.sigmoid()
        if image_only is None:
            return alpha
        return torch.where(image_only, torch.ones_like(alpha), alpha)[:, :, None, None, None]


class FeedForward(nn.Module):
    """Layer norm, then an MLP with a GEGLU (arXiv 2002.05202) of four times the block's width."""

    kernels = "auto"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.proj_in = Linear(width, 8 * width)
        self.proj_out = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(geglu(self.proj_in(self.norm(x)), self.kernels))


class SelfAttention(nn.Module):
    """Base class of attention among a frame's pixels and among a pixel's frames."""

    backend: Backend

    def __init__(self, width: int, head_width: int, backend: str) -> None:
        super().__init__()
        self.head_width = head_width
        self.backend = backend
        self.norm = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * width, bias=False)
        self.out = Linear(width, width)

    def attend(self, qkv: Tensor) -> Tensor:
        """Compute attention among tokens: (..., tokens, 3 C) to (..., tokens, heads, head width)."""
        return self_attention(qkv.unflatten(-1, (3, -1, self.head_width)), self.backend)


class CrossAttention(nn.Module):
    """Layer norm, then attention of every position of a clip to the clip's context tokens.

    A position attends to the context alone, so the grouping of positions, by frame in the spatial transformer
    and by pixel in the temporal one, has no effect: both are one attention of T * h * w queries to L keys,
    and keys and values are computed once a clip.
    """

    backend: Backend

    def __init__(self, width: int, context_width: int, head_width: int, backend: str) -> None:
        super().__init__()
        self.head_width = head_width
        self.backend = backend
        self.norm = nn.LayerNorm(width)
        self.q = Linear(width, width, bias=False)
        self.kv = Linear(context_width, 2 * width, bias=False)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Return the term to add to x: its shape is x's, or (B, 1, 1, 1, C) if the context has one token.

        Args:
            x: (B, T, h, w, C).
            context: (B, L, D).
        """
        keys, values = self.kv(context).chunk(2, dim=-1)
        if context.shape[1] == 1:
            # The softmax of one score is 1 for any query, so only the value path is left.
            return self.out(values)[:, :, None, None, :]
        heads = (-1, self.head_width)
        queries = self.q(self.norm(x)).flatten(1, 3)
        attended = attention(
            queries.unflatten(-1, heads), keys.unflatten(-1, heads), values.unflatten(-1, heads), self.backend
        )
        return self.out(attended.flatten(-2)).view(x.shape)


def choose_kernels(network: nn.Module, kernels: str, attention: Backend = "auto") -> None:
    """Set the kernels of a network's norms and feed-forwards, and the meaning of `auto` in its attention.

    Args:
        kernels: one of fused.KERNELS.
        attention: backend of the attentions whose own is auto.
    """
    for module in network.modules():
        if isinstance(module, (_GroupNorm, FeedForward)):
            module.kernels = kernels
        elif isinstance(module, (SelfAttention, CrossAttention)) and module.backend == "auto":
            module.backend = attention
