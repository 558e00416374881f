"""The small parts that the spatial and the temporal blocks share.

Everything inside the UNet is (B, T, H, W, C) and contiguous: B clips, T frames, H x W latent pixels, C
channels. No layer moves data only to change its order: convolutions and norms read that memory as it lies
(fused.py).

Initial values are torch's defaults but for Alpha, the mask embedding, and the layers named Zero..., which
start at zero as in the public code (sgm `zero_module`). Each layer sets its own parameters in its own
constructor: DeepSpeed's zero.Init shares a parameter out over the ranks as soon as that constructor returns.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svd_ds.model.ops.attention import attention
from svd_ds.model.ops.fused import conv, geglu, group_norm_silu

NORM_GROUPS = 32


class _Conv(nn.Module):
    """Weight and bias of a 2-D convolution, drawn as torch does; the weight is (out, height, width, in)."""

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

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        y_NHWC = conv(x_BTHWC.flatten(0, 1), self.weight, self.bias, self.stride, padding=(1, 1))
        return y_NHWC.unflatten(0, x_BTHWC.shape[:2])


class TemporalConv(_Conv):
    """Convolution over three neighbouring frames, pixel by pixel; beyond the clip's ends are zeros.

    The public code has a 3-D convolution with the kernel 3 x 1 x 1. Over the plane (T, H*W) it is a 2-D one
    with the kernel 3 x 1, which a CPU does faster.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, 1)

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        y_BTSC = conv(x_BTHWC.flatten(2, 3), self.weight, self.bias, padding=(1, 0))
        return y_BTSC.unflatten(2, x_BTHWC.shape[2:4])


class Linear(nn.Linear):
    """A linear layer over the last dimension.

    For many rows of float32 on a CPU the product goes to oneDNN as a 1 x 1 convolution of a batch of 16,
    which can be faster than torch's own way, BLAS; for few it would be slower.
    """

    BATCH, MIN_ROWS = 16, 512

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if not x.is_cpu or x.dtype != torch.float32 or rows % self.BATCH or rows < self.MIN_ROWS:
            return super().forward(x)
        y_NHWC = conv(x.reshape(self.BATCH, -1, 1, x.shape[-1]), self.weight[:, None, None], self.bias)
        return y_NHWC.view(*x.shape[:-1], -1)


class _ZeroInit(nn.Module):
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class ZeroFrameConv(_ZeroInit, FrameConv):
    """A FrameConv that starts at zero."""


class ZeroTemporalConv(_ZeroInit, TemporalConv):
    """A TemporalConv that starts at zero."""


class ZeroLinear(_ZeroInit, Linear):
    """A linear layer that starts at zero."""


class _Norm(nn.GroupNorm):
    """Group norm over all but the first dimension, channels last, then SiLU."""

    kernels = "auto"

    def __init__(self, channels: int, eps: float, silu: bool = True) -> None:
        super().__init__(NORM_GROUPS, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        y_NSC = group_norm_silu(
            x.flatten(1, -2), self.weight, self.bias, self.num_groups, self.eps, self.silu, self.kernels
        )
        return y_NSC.view(x.shape)


class FrameGroupNorm(_Norm):
    """Group norm with the statistics of each frame, over H x W, then SiLU."""

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        return super().forward(x_BTHWC.flatten(0, 1)).view(x_BTHWC.shape)


class VideoGroupNorm(_Norm):
    """Group norm with the statistics of each clip, over T x H x W, then SiLU."""


def sinusoid(values: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of `values` at width/2 frequencies, 1 down to 1/10000: (..., width), float32."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / half
    frequencies = torch.exp(-math.log(10_000) * exponents)
    angles = values.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, in_width: int, hidden_width: int, out_width: int) -> None:
        super().__init__()
        self.linear1 = Linear(in_width, hidden_width)
        self.linear2 = Linear(hidden_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.silu(self.linear1(x.to(self.linear1.weight.dtype))))


class MaskEmbedding(_ZeroInit):
    """What a frame that is not given has for its latents: the m of arXiv 2311.15127 D.5.

    One number a channel, the same at every pixel. The paper's m is of the latents' shape, which would tie the
    network to one size; where a pixel lies, the convolutions around it tell already.
    """

    tag = "condition"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def forward(self, x_BTCHW: Tensor) -> Tensor:
        """Last among x's channels are the given frames' latents, and the mask: 1 where a frame is given."""
        channels = len(self.weight)
        others, given, mask = x_BTCHW.split([x_BTCHW.shape[2] - channels - 1, channels, 1], dim=2)
        return torch.cat([others, torch.where(mask == 1, given, self.weight[:, None, None]), mask], dim=2)


class AlphaBlender(nn.Module):
    """The learned share of the spatial path in a block's output: alpha = sigmoid(mix_factor).

    An image, a frame without neighbours in time, has alpha = 1 (sgm's merge strategy `learned_with_images`).
    """

    tag = "temporal"

    def __init__(self) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.mix_factor, 0.5)

    def forward(self, image_only_BT: Tensor | None) -> Tensor:
        """alpha, shaped to broadcast over (B, T, H, W, C)."""
        alpha = self.mix_factor.sigmoid()
        if image_only_BT is None:
            return alpha
        return torch.where(image_only_BT, torch.ones_like(alpha), alpha)[:, :, None, None, None]


class FeedForward(nn.Module):
    """Norm, then the gated GEGLU unit (arXiv 2002.05202) four times as wide as the block."""

    kernels = "auto"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.proj_in = Linear(width, 8 * width)
        self.proj_out = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(geglu(self.proj_in(self.norm(x)), self.kernels))


def choose_kernels(network: nn.Module, kernels: str) -> None:
    """Have the network's norms and feed-forwards run on `kernels`, one of fused.KERNELS."""
    for module in network.modules():
        if isinstance(module, (_Norm, FeedForward)):
            module.kernels = kernels


class SelfAttention(nn.Module):
    """What attention among a frame's pixels and among a pixel's frames have in common."""

    def __init__(self, width: int, head_width: int, backend: str) -> None:
        super().__init__()
        self.head_width = head_width
        self.backend = backend
        self.norm = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * width, bias=False)
        self.out = Linear(width, width)

    def mix(self, qkv: Tensor) -> Tensor:
        """Attention among tokens, (..., tokens, 3 C) -> (..., tokens, heads, head width)."""
        q, k, v = qkv.unflatten(-1, (3, -1, self.head_width)).unbind(-3)
        return attention(q, k, v, self.backend)


class CrossAttention(nn.Module):
    """Norm, then attention of every position of a clip to the clip's context tokens.

    A position attends to the context alone, so it makes no difference whether positions are grouped by
    frame, as in the spatial transformer, or by pixel, as in the temporal one: both are one attention of
    T*H*W queries to L keys, and keys and values are computed once a clip.
    """

    def __init__(self, width: int, context_width: int, head_width: int, backend: str) -> None:
        super().__init__()
        self.head_width = head_width
        self.backend = backend
        self.norm = nn.LayerNorm(width)
        self.q = Linear(width, width, bias=False)
        self.kv = Linear(context_width, 2 * width, bias=False)
        self.out = Linear(width, width)

    def forward(self, x_BTHWC: Tensor, context_BLD: Tensor) -> Tensor:
        """What to add to x: like x, or (B, 1, 1, 1, C) where the context is one token."""
        keys, values = self.kv(context_BLD).chunk(2, dim=-1)
        if context_BLD.shape[1] == 1:
            # The softmax of one score is 1, whatever the query: only the value path is left.
            return self.out(values)[:, :, None, None, :]
        heads = (-1, self.head_width)
        queries = self.q(self.norm(x_BTHWC)).flatten(1, 3)
        mixed = attention(
            queries.unflatten(-1, heads), keys.unflatten(-1, heads), values.unflatten(-1, heads), self.backend
        )
        return self.out(mixed.flatten(-2)).view(x_BTHWC.shape)
