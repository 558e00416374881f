"""The network without layers of time: an image model, Stable Diffusion 2.1's, and stage 1's of the paper.

Its blocks are what those with layers of time (blocks.py, pseudo3d.py) extend, so that a video network takes
their weights as they are. A clip's frames do not know of each other; an image is a clip of one.

x_BTHWC: B clips, T frames, H x W latent pixels, C channels; E: width of the time embedding; L, D: context
tokens and their width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from svd_ds.model.layers import FrameGroupNorm, Linear, ZeroLinear
from svd_ds.model.spatial import SpatialResidual, SpatialTransformerBlock


@dataclass(frozen=True)
class TransformerSizes:
    """What the transformers of all levels have in common."""

    context_width: int
    head_width: int
    depth: int
    """Blocks, or pairs of blocks, in a row."""
    spatial_attention: str
    temporal_attention: str


class ImageResidual(nn.Module):
    """The spatial residual block alone."""

    def __init__(self, in_width: int, width: int, embedding_width: int, eps: float) -> None:
        super().__init__()
        self.spatial = SpatialResidual(in_width, width, embedding_width, eps)

    def forward(self, x_BTHWC: Tensor, embedding_BE: Tensor, image_only_BT: Tensor | None = None) -> Tensor:
        return self.spatial(x_BTHWC, embedding_BE)


class ImageTransformer(nn.Module):
    """Spatial transformer blocks around one residual connection."""

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

    def forward(self, x_BTHWC: Tensor, context_BLD: Tensor, image_only_BT: Tensor | None = None) -> Tensor:
        h = self.proj_in(self.norm(x_BTHWC))
        return x_BTHWC + self.proj_out(self.inner(h, context_BLD, image_only_BT))

    def inner(self, h_BTHWC: Tensor, context_BLD: Tensor, image_only_BT: Tensor | None) -> Tensor:
        """What stands between the projections."""
        for spatial in self.spatial:
            h_BTHWC = spatial(h_BTHWC, context_BLD)
        return h_BTHWC
