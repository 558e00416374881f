"""The image half of the network: what Stable Diffusion 2.1 does to each frame on its own.

x_BTHWC: B clips, T frames, H x W latent pixels, C channels; E: width of the time embedding; L, D: context
tokens and their width. Source: sgm `openaimodel.py` (ResBlock), `attention.py` (BasicTransformerBlock).
"""

from __future__ import annotations

from torch import Tensor, nn

from svd_ds.model.layers import (
    CrossAttention,
    FeedForward,
    FrameConv,
    FrameGroupNorm,
    Linear,
    SelfAttention,
    ZeroFrameConv,
)


class SpatialResidual(nn.Module):
    """Two 3 x 3 convolutions around a residual connection, shifted in between by the time embedding."""

    tag = "spatial"

    def __init__(self, in_width: int, width: int, embedding_width: int, eps: float) -> None:
        super().__init__()
        self.norm1 = FrameGroupNorm(in_width, eps)
        self.conv1 = FrameConv(in_width, width)
        self.time_projection = Linear(embedding_width, width)
        self.norm2 = FrameGroupNorm(width, eps)
        self.conv2 = ZeroFrameConv(width, width)
        self.shortcut = Linear(in_width, width) if in_width != width else nn.Identity()

    def forward(self, x_BTHWC: Tensor, embedding_BE: Tensor) -> Tensor:
        """embedding_BE has been through its SiLU already: it is the same for every block."""
        h = self.conv1(self.norm1(x_BTHWC))
        h = h + self.time_projection(embedding_BE)[:, None, None, None, :]
        h = self.conv2(self.norm2(h))
        return self.shortcut(x_BTHWC) + h


class SpatialAttention(SelfAttention):
    """Norm, then self-attention among the pixels of each frame."""

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        qkv_NSC = self.qkv(self.norm(x_BTHWC)).flatten(0, 1).flatten(1, 2)
        return self.out(self.mix(qkv_NSC).reshape(x_BTHWC.shape))


class SpatialTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each normed first and added to its input."""

    tag = "spatial"

    def __init__(self, width: int, context_width: int, head_width: int, backend: str) -> None:
        super().__init__()
        self.attention = SpatialAttention(width, head_width, backend)
        self.cross = CrossAttention(width, context_width, head_width, backend)
        self.feed_forward = FeedForward(width)

    def forward(self, x_BTHWC: Tensor, context_BLD: Tensor) -> Tensor:
        x = x_BTHWC + self.attention(x_BTHWC)
        x = x + self.cross(x, context_BLD)
        return x + self.feed_forward(x)
