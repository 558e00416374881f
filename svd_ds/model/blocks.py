"""Spatial blocks joined with their temporal blocks, and the stages of the UNet.

x is (B, T, h, w, C): B clips, T frames, h x w latent pixels, C channels. embedding is (B, E), E the width of
the time embedding; context (B, L, D), L tokens of width D; image_only (B, T) bool, True if a frame is an
independent image.

Source: sgm `video_model.py` (VideoResBlock), `video_attention.py` (SpatialVideoTransformer).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svd_ds.model.image import ImageResidual, ImageTransformer, TransformerSizes
from svd_ds.model.layers import AlphaBlender, FrameConv
from svd_ds.model.temporal import FramePositions, TemporalResidual, TemporalTransformerBlock


# VideoLDM section 3.1: alpha z + (1 - alpha) z', with z = y and z' = y + temporal(y).
class Residual(ImageResidual):
    """Spatial residual block, then a temporal one: y + (1 - alpha) temporal(y), with y = spatial(x).

    This equals the blend of y and y + temporal(y) with shares alpha and 1 - alpha (VideoLDM, arXiv 2304.08818
    section 3.1), in one pass less.
    """

    def __init__(self, in_width: int, width: int, embedding_width: int, eps: float) -> None:
        super().__init__(in_width, width, embedding_width, eps)
        self.temporal = TemporalResidual(width, embedding_width, eps)
        self.alpha = AlphaBlender()

    def forward(self, x: Tensor, embedding: Tensor, image_only: Tensor | None = None) -> Tensor:
        y_BThwC = self.spatial(x, embedding)
        return torch.addcmul(y_BThwC, self.temporal(y_BThwC, embedding), 1 - self.alpha(image_only))


# VideoLDM section 3.1: alpha z + (1 - alpha) z', with z = y and z' = temporal(y + positions).
class Transformer(ImageTransformer):
    """Spatial transformer blocks, each blended with a temporal one by alpha, around one residual connection
    (VideoLDM, arXiv 2304.08818 section 3.1)."""

    def __init__(self, width: int, sizes: TransformerSizes) -> None:
        super().__init__(width, sizes)
        self.positions = FramePositions(width)
        self.temporal = nn.ModuleList(
            TemporalTransformerBlock(width, sizes.context_width, sizes.head_width, sizes.temporal_attention)
            for _ in range(sizes.depth)
        )
        self.alpha = AlphaBlender()

    def apply_blocks(self, h: Tensor, context: Tensor, image_only: Tensor | None) -> Tensor:
        """Run the blocks between the input and the output projection."""
        positions_T11C = self.positions(h.shape[1], h.device)
        alpha = self.alpha(image_only)
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            y_BThwC = spatial(h, context)
            h = torch.lerp(temporal(y_BThwC + positions_T11C, context), y_BThwC, alpha)
        return h


class Downsample(nn.Module):
    """Convolution of stride 2, which halves height and width (sgm openaimodel.py)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = FrameConv(width, width, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to twice the height and width, then a convolution (sgm openaimodel.py)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = FrameConv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x_NChw = x.flatten(0, 1).permute(0, 3, 1, 2)
        doubled_NChw = F.interpolate(x_NChw, scale_factor=2.0, mode="nearest")
        return self.conv(doubled_NChw.permute(0, 2, 3, 1).unflatten(0, x.shape[:2]))


class UNetStage(nn.Module):
    """Stage of the UNet: a residual block, a transformer and a change of size, each of them optional."""

    def __init__(
        self,
        residual: nn.Module | None = None,
        transformer: nn.Module | None = None,
        resize: Downsample | Upsample | None = None,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.transformer = transformer
        self.resize = resize

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor, image_only: Tensor | None) -> Tensor:
        """Run the parts that the stage has."""
        if self.residual is not None:
            x = self.residual(x, embedding, image_only)
        if self.transformer is not None:
            x = self.transformer(x, context, image_only)
        if self.resize is not None:
            x = self.resize(x)
        return x
