"""The spatial blocks: those of Stable Diffusion 2.1, applied to each frame independently.

x is (B, T, h, w, C): B clips, T frames, h x w latent pixels, C channels. embedding is (B, E), E the width of
the time embedding; context (B, L, D), L tokens of width D; image_only (B, T) bool, True if a frame is an
independent image.

Source: sgm `openaimodel.py` (ResBlock), `attention.py` (BasicTransformerBlock).
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
    """Residual block: shortcut(x) + conv2(norm2(conv1(norm1(x)) + time embedding)); norms include SiLU
    (sgm openaimodel.py, ResBlock)."""

    tag = "spatial"

    def __init__(self, in_width: int, width: int, embedding_width: int, eps: float) -> None:
        super().__init__()
        self.norm1 = FrameGroupNorm(in_width, eps)
        self.conv1 = FrameConv(in_width, width)
        self.time_projection = Linear(embedding_width, width)
        self.norm2 = FrameGroupNorm(width, eps)
        self.conv2 = ZeroFrameConv(width, width)
        self.shortcut = Linear(in_width, width) if in_width != width else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Apply the block; the UNet has applied SiLU to `embedding`, once for all blocks."""
        h_BThwC = self.conv1(self.norm1(x))
        h_BThwC = h_BThwC + self.time_projection(embedding)[:, None, None, None, :]
        h_BThwC = self.conv2(self.norm2(h_BThwC))
        return self.shortcut(x) + h_BThwC


class SpatialAttention(SelfAttention):
    """Layer norm, then self-attention among the pixels of each frame."""

    def forward(self, x: Tensor) -> Tensor:
        qkv_NSC = self.qkv(self.norm(x)).flatten(0, 1).flatten(1, 2)
        return self.out(self.attend(qkv_NSC).reshape(x.shape))


class SpatialTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with a layer norm and a residual connection
    (sgm attention.py, BasicTransformerBlock)."""

    tag = "spatial"

    def __init__(self, width: int, context_width: int, head_width: int, backend: str) -> None:
        super().__init__()
        self.attention = SpatialAttention(width, head_width, backend)
        self.cross = CrossAttention(width, context_width, head_width, backend)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attention(x)
        x = x + self.cross(x, context)
        return x + self.feed_forward(x)
