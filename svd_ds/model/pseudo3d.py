"""Make-A-Video's layers of time in place of SVD's, for comparison (arXiv 2209.14792 section 3.2: pseudo-3D).

A convolution over time follows each 3 x 3 convolution of a residual block and starts as the identity;
attention over time follows each spatial transformer block and starts with an output of zero. So the network
starts as the image model. Nothing is blended, and only the image model's layers see the context.

x_BTHWC: B clips, T frames, H x W latent pixels, C channels; E: width of the time embedding; L, D: context
tokens and their width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svd_ds.model.image import ImageResidual, ImageTransformer, TransformerSizes
from svd_ds.model.layers import TemporalConv, ZeroLinear
from svd_ds.model.temporal import FramePositions, TemporalAttention


class IdentityTemporalConv(TemporalConv):
    """A convolution over time that starts as the identity."""

    tag = "temporal"

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        middle_frame = self.weight.data.select(self.weight.shape.index(3), 1)
        nn.init.eye_(middle_frame.squeeze())


class ZeroTemporalAttention(TemporalAttention):
    """Attention over time whose output starts at zero."""

    tag = "temporal"

    def __init__(self, width: int, head_width: int, backend: str) -> None:
        super().__init__(width, head_width, backend)
        self.out = ZeroLinear(width, width)


class PseudoResidual(ImageResidual):
    """The spatial residual block, each of its convolutions followed by one over time."""

    def __init__(self, in_width: int, width: int, embedding_width: int, eps: float) -> None:
        super().__init__(in_width, width, embedding_width, eps)
        self.temporal1 = IdentityTemporalConv(width, width)
        self.temporal2 = IdentityTemporalConv(width, width)

    def forward(self, x_BTHWC: Tensor, embedding_BE: Tensor, image_only_BT: Tensor | None = None) -> Tensor:
        spatial = self.spatial
        h = spatial.conv1(spatial.norm1(x_BTHWC))
        h = _unless_image(image_only_BT, h, self.temporal1(h))
        h = h + spatial.time_projection(embedding_BE)[:, None, None, None, :]
        h = spatial.conv2(spatial.norm2(h))
        h = _unless_image(image_only_BT, h, self.temporal2(h))
        return spatial.shortcut(x_BTHWC) + h


class PseudoTransformer(ImageTransformer):
    """Spatial transformer blocks, each followed by attention over time, around one residual connection."""

    def __init__(self, width: int, sizes: TransformerSizes) -> None:
        super().__init__(width, sizes)
        self.positions = FramePositions(width)
        self.temporal = nn.ModuleList(
            ZeroTemporalAttention(width, sizes.head_width, sizes.temporal_attention)
            for _ in range(sizes.depth)
        )

    def inner(self, h_BTHWC: Tensor, context_BLD: Tensor, image_only_BT: Tensor | None) -> Tensor:
        positions_T11C = self.positions(h_BTHWC.shape[1], h_BTHWC.device)
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            y = spatial(h_BTHWC, context_BLD)
            h_BTHWC = _unless_image(image_only_BT, y, y + temporal(y + positions_T11C))
        return h_BTHWC


def _unless_image(image_only_BT: Tensor | None, image_BTHWC: Tensor, video_BTHWC: Tensor) -> Tensor:
    """The second, but the first for frames that are images of their own."""
    if image_only_BT is None:
        return video_BTHWC
    return torch.where(image_only_BT[:, :, None, None, None], image_BTHWC, video_BTHWC)
