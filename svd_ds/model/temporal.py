"""The video half of the network: layers that look along time, inserted after each spatial one (arXiv
2311.15127 D.2).

x_BTHWC: B clips, T frames, H x W latent pixels, C channels; E: width of the time embedding; L, D: context
tokens and their width. Source: sgm `video_model.py` (VideoResBlock), `video_attention.py`
(VideoTransformerBlock).
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
    sinusoid,
)


class TemporalResidual(nn.Module):
    """Two convolutions over time, shifted in between by the time embedding. The caller adds the result to
    x."""

    tag = "temporal"

    def __init__(self, width: int, embedding_width: int, eps: float) -> None:
        super().__init__()
        self.norm1 = VideoGroupNorm(width, eps)
        self.conv1 = TemporalConv(width, width)
        self.time_projection = Linear(embedding_width, width)
        self.norm2 = VideoGroupNorm(width, eps)
        self.conv2 = ZeroTemporalConv(width, width)

    def forward(self, x_BTHWC: Tensor, embedding_BE: Tensor) -> Tensor:
        """embedding_BE has been through its SiLU already: it is the same for every block."""
        h = self.conv1(self.norm1(x_BTHWC))
        h = h + self.time_projection(embedding_BE)[:, None, None, None, :]
        return self.conv2(self.norm2(h))


class FramePositions(nn.Module):
    """A learned function of the frame's index, added to every pixel of the frame. Positions are absolute,
    0..T-1."""

    tag = "temporal"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mlp = EmbeddingMLP(width, 4 * width, width)

    def forward(self, num_frames: int, device: torch.device) -> Tensor:
        """(T, 1, 1, C)."""
        return self.mlp(sinusoid(torch.arange(num_frames, device=device), self.width))[:, None, None, :]


class TemporalAttention(SelfAttention):
    """Norm, then self-attention of each pixel among its frames."""

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        qkv_BSTC = self.qkv(self.norm(x_BTHWC)).flatten(2, 3).transpose(1, 2)
        return self.out(self.mix(qkv_BSTC).transpose(1, 2).reshape(x_BTHWC.shape))


class TemporalTransformerBlock(nn.Module):
    """Feed-forward, self-attention over time, cross-attention, feed-forward, each normed first and added."""

    tag = "temporal"

    def __init__(self, width: int, context_width: int, head_width: int, backend: str) -> None:
        super().__init__()
        self.feed_forward_in = FeedForward(width)
        self.attention = TemporalAttention(width, head_width, backend)
        self.cross = CrossAttention(width, context_width, head_width, backend)
        self.feed_forward = FeedForward(width)

    def forward(self, x_BTHWC: Tensor, context_BLD: Tensor) -> Tensor:
        x = x_BTHWC + self.feed_forward_in(x_BTHWC)
        x = x + self.attention(x)
        x = x + self.cross(x, context_BLD)
        return x + self.feed_forward(x)
