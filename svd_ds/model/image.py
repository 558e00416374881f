"""The blocks of the network without temporal layers: Stable Diffusion 2.1, and stage 1 of the paper.

The video blocks (blocks.py, pseudo3d.py) extend these blocks, so a video network takes the image model's
weights under the same names. Frames are independent of each other; an image is a clip of one frame.

x is (B, T, h, w, C): B clips, T frames, h x w latent pixels, C channels. embedding is (B, E), E the width of
the time embedding; context (B, L, D), L tokens of width D; image_only (B, T) bool, True if a frame is an
independent image.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from svd_ds.model.layers import FrameGroupNorm, Linear, ZeroLinear
from svd_ds.model.spatial import SpatialResidual, SpatialTransformerBlock


@dataclass(frozen=True)
class TransformerSizes:
    """Settings that the transformers of all levels share."""

    context_width: int
    head_width: int
    depth: int
    """Number of spatial blocks, each with its temporal block (if any)."""
    spatial_attention: str
    temporal_attention: str


class ImageResidual(nn.Module):
    """Residual block of the image model."""

    def __init__(self, in_width: int, width: int, embedding_width: int, eps: float) -> None:
        super().__init__()
        self.spatial = SpatialResidual(in_width, width, embedding_width, eps)

    def forward(self, x: Tensor, embedding: Tensor, image_only: Tensor | None = None) -> Tensor:
        return self.spatial(x, embedding)


class ImageTransformer(nn.Module):
    """Transformer of the image model: x + out(blocks(in(norm(x)))) (sgm attention.py, SpatialTransformer)."""

    tag = "spatial"

    def __init__(self, width: int, sizes: TransformerSizes) -> None:
        super().__init__()
        self.norm = FrameGroupNorm(width, eps=1e-6, silu=False)
        self.proj_in = Linear(width, width)
        self.spatial = nn.ModuleList(
            SpatialTransformerBlock(width, sizes.context_width, sizes.head_width, sizes.spatial_attention)
            for _ in range(sizes.depth)
        )
        self.proj_out = ZeroLinear(width, width)

    def forward(self, x: Tensor, context: Tensor, image_only: Tensor | None = None) -> Tensor:
        h_BThwC = self.proj_in(self.norm(x))
        return x + self.proj_out(self.apply_blocks(h_BThwC, context, image_only))

    def apply_blocks(self, h: Tensor, context: Tensor, image_only: Tensor | None) -> Tensor:
        """Run the blocks between the input and the output projection."""
        for spatial in self.spatial:
            h = spatial(h, context)
        return h
