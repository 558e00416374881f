"""The temporal blocks, which mix frames; one follows each spatial block (arXiv 2311.15127 section D.2;
VideoLDM, arXiv 2304.08818 section 3.1).

x is (B, T, h, w, C): B clips, T frames, h x w latent pixels, C channels. embedding is (B, E), E the width of
the time embedding; context (B, L, D), L tokens of width D; image_only (B, T) bool, True if a frame is an
independent image.

Source: sgm `video_model.py` (VideoResBlock), `video_attention.py` (VideoTransformerBlock).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svd_ds.model.layers import (
    CrossAttention,
    EmbeddingMLP,
    FeedForward,
    Linear,
    SelfAttention,
    TemporalConv,
    VideoGroupNorm,
    ZeroTemporalConv,
    sinusoidal_embedding,
)


class TemporalResidual(nn.Module):
    """Residual block over time, kernel 3 x 1 x 1: conv2(norm2(conv1(norm1(x)) + time embedding)). The caller
    adds x (VideoLDM section 3.1: residual blocks with 3-D convolutions)."""

    tag = "temporal"

    def __init__(self, width: int, embedding_width: int, eps: float) -> None:
        super().__init__()
        self.norm1 = VideoGroupNorm(width, eps)
        self.conv1 = TemporalConv(width, width)
        self.time_projection = Linear(embedding_width, width)
        self.norm2 = VideoGroupNorm(width, eps)
        self.conv2 = ZeroTemporalConv(width, width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Apply the block; the UNet has applied SiLU to `embedding`, once for all blocks."""
        h_BThwC = self.conv1(self.norm1(x))
        h_BThwC = h_BThwC + self.time_projection(embedding)[:, None, None, None, :]
        return self.conv2(self.norm2(h_BThwC))


class FramePositions(nn.Module):
    """Embedding of the frame index, added to every pixel of the frame: an MLP of sinusoids (VideoLDM section
    3.1). Positions are absolute, 0 to T - 1."""

    tag = "temporal"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mlp = EmbeddingMLP(width, 4 * width, width)

    def forward(self, num_frames: int, device: torch.device) -> Tensor:
        """Return the embeddings of all frames, (T, 1, 1, C)."""
        indices_T = torch.arange(num_frames, device=device)
        return self.mlp(sinusoidal_embedding(indices_T, self.width))[:, None, None, :]


class TemporalAttention(SelfAttention):
    """Layer norm, then self-attention among the frames of each pixel (VideoLDM section 3.1)."""

    def forward(self, x: Tensor) -> Tensor:
        qkv_BSTC = self.qkv(self.norm(x)).flatten(2, 3).transpose(1, 2)
        return self.out(self.attend(qkv_BSTC).transpose(1, 2).reshape(x.shape))


class TemporalTransformerBlock(nn.Module):
    """Feed-forward, self-attention over time, cross-attention and feed-forward, each with a layer norm and a
    residual connection (sgm video_attention.py, VideoTransformerBlock)."""

    tag = "temporal"

    def __init__(self, width: int, context_width: int, head_width: int, backend: str) -> None:
        super().__init__()
        self.feed_forward_in = FeedForward(width)
        self.attention = TemporalAttention(width, head_width, backend)
        self.cross = CrossAttention(width, context_width, head_width, backend)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Apply the block."""
        x = x + self.feed_forward_in(x)
        x = x + self.attention(x)
        x = x + self.cross(x, context)
        return x + self.feed_forward(x)
