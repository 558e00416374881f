"""A spatial block and its temporal follower as one unit, and the steps of the UNet's path made of them.

x_BTHWC: B clips, T frames, H x W latent pixels, C channels; E: width of the time embedding; L, D: context
tokens and their width. Source: sgm `video_model.py` (VideoResBlock), `video_attention.py`
(SpatialVideoTransformer).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svd_ds.model.image import ImageResidual, ImageTransformer, TransformerSizes
from svd_ds.model.layers import AlphaBlender, FrameConv
from svd_ds.model.temporal import FramePositions, TemporalResidual, TemporalTransformerBlock


class Residual(ImageResidual):
    """A spatial residual block, then a temporal one: y + (1 - alpha) temporal(y), with y = spatial(x).

    Equal to blending y and y + temporal(y) with shares alpha and 1 - alpha, in one pass less.
    """

    def __init__(self, in_width: int, width: int, embedding_width: int, eps: float) -> None:
        super().__init__(in_width, width, embedding_width, eps)
        self.temporal = TemporalResidual(width, embedding_width, eps)
        self.alpha = AlphaBlender()

    def forward(self, x_BTHWC: Tensor, embedding_BE: Tensor, image_only_BT: Tensor | None = None) -> Tensor:
        y = self.spatial(x_BTHWC, embedding_BE)
        return torch.addcmul(y, self.temporal(y, embedding_BE), 1 - self.alpha(image_only_BT))


class Transformer(ImageTransformer):
    """Pairs of a spatial and a temporal transformer block, blended by alpha, around one residual
    connection."""

    def __init__(self, width: int, sizes: TransformerSizes) -> None:
        super().__init__(width, sizes)
        self.positions = FramePositions(width)
        self.temporal = nn.ModuleList(
            TemporalTransformerBlock(width, sizes.context_width, sizes.head_width, sizes.temporal_attention)
            for _ in range(sizes.depth)
        )
        self.alpha = AlphaBlender()

    def inner(self, h_BTHWC: Tensor, context_BLD: Tensor, image_only_BT: Tensor | None) -> Tensor:
        positions_T11C = self.positions(h_BTHWC.shape[1], h_BTHWC.device)
        alpha = self.alpha(image_only_BT)
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            y = spatial(h_BTHWC, context_BLD)
            h_BTHWC = torch.lerp(temporal(y + positions_T11C, context_BLD), y, alpha)
        return h_BTHWC


class Downsample(nn.Module):
    """Half the height and width, by a convolution of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = FrameConv(width, width, stride=2)

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        return self.conv(x_BTHWC)


class Upsample(nn.Module):
    """Twice the height and width: nearest neighbour, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = FrameConv(width, width)

    def forward(self, x_BTHWC: Tensor) -> Tensor:
        x_NCHW = x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2)
        doubled_NCHW = F.interpolate(x_NCHW, scale_factor=2.0, mode="nearest")
        return self.conv(doubled_NCHW.permute(0, 2, 3, 1).unflatten(0, x_BTHWC.shape[:2]))


class UNetStage(nn.Module):
    """One step of the UNet's path: a residual block, a transformer, a change of size, each where there is
    one."""

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

    def forward(
        self, x_BTHWC: Tensor, embedding_BE: Tensor, context_BLD: Tensor, image_only_BT: Tensor | None
    ) -> Tensor:
        if self.residual is not None:
            x_BTHWC = self.residual(x_BTHWC, embedding_BE, image_only_BT)
        if self.transformer is not None:
            x_BTHWC = self.transformer(x_BTHWC, context_BLD, image_only_BT)
        if self.resize is not None:
            x_BTHWC = self.resize(x_BTHWC)
        return x_BTHWC
