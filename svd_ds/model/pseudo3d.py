"""Make-A-Video's temporal layers in place of SVD's, for comparison (arXiv 2209.14792 section 3.2: pseudo-3D).

A convolution over time follows each 3 x 3 convolution of a residual block and starts as the identity;
attention over time follows each spatial transformer block and starts with an output of zero. Therefore the
network starts as the image model. There is no learned blend, and only the image model's layers attend to the
context.

x is (B, T, h, w, C): B clips, T frames, h x w latent pixels, C channels. embedding is (B, E), E the width of
the time embedding; context (B, L, D), L tokens of width D; image_only (B, T) bool, True if a frame is an
independent image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svd_ds.model.image import ImageResidual, ImageTransformer, TransformerSizes
from svd_ds.model.layers import TemporalConv, ZeroLinear
from svd_ds.model.temporal import FramePositions, TemporalAttention


class IdentityTemporalConv(TemporalConv):
    """Convolution over time, initialised to the identity (arXiv 2209.14792 section 3.2)."""

    tag = "temporal"

    def reset_parameters(self) -> None:
        """Set the weight of the middle frame to the identity, and all others to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        middle_frame = self.weight.data.select(self.weight.shape.index(3), 1)
        nn.init.eye_(middle_frame.squeeze())


class ZeroTemporalAttention(TemporalAttention):
    """Attention over time, its output projection initialised to zero (arXiv 2209.14792 section 3.2)."""

    tag = "temporal"

    def __init__(self, width: int, head_width: int, backend: str) -> None:
        super().__init__(width, head_width, backend)
        self.out = ZeroLinear(width, width)


class PseudoResidual(ImageResidual):
    """Spatial residual block, each of its convolutions followed by one over time (pseudo-3D convolution)."""

    def __init__(self, in_width: int, width: int, embedding_width: int, eps: float) -> None:
        super().__init__(in_width, width, embedding_width, eps)
        self.temporal1 = IdentityTemporalConv(width, width)
        self.temporal2 = IdentityTemporalConv(width, width)

    def forward(self, x: Tensor, embedding: Tensor, image_only: Tensor | None = None) -> Tensor:
        """Apply the block; the UNet has applied SiLU to `embedding`, once for all blocks."""
        spatial = self.spatial
        h_BThwC = spatial.conv1(spatial.norm1(x))
        h_BThwC = _select(image_only, h_BThwC, self.temporal1(h_BThwC))
        h_BThwC = h_BThwC + spatial.time_projection(embedding)[:, None, None, None, :]
        h_BThwC = spatial.conv2(spatial.norm2(h_BThwC))
        h_BThwC = _select(image_only, h_BThwC, self.temporal2(h_BThwC))
        return spatial.shortcut(x) + h_BThwC


class PseudoTransformer(ImageTransformer):
    """Spatial transformer blocks, each followed by attention over time (pseudo-3D attention)."""

    def __init__(self, width: int, sizes: TransformerSizes) -> None:
        super().__init__(width, sizes)
        self.positions = FramePositions(width)
        self.temporal = nn.ModuleList(
            ZeroTemporalAttention(width, sizes.head_width, sizes.temporal_attention)
            for _ in range(sizes.depth)
        )

    def apply_blocks(self, h: Tensor, context: Tensor, image_only: Tensor | None) -> Tensor:
        """Run the blocks between the input and the output projection."""
        positions_T11C = self.positions(h.shape[1], h.device)
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            y_BThwC = spatial(h, context)
            h = _select(image_only, y_BThwC, y_BThwC + temporal(y_BThwC + positions_T11C))
        return h


def _select(image_only_BT: Tensor | None, image_BThwC: Tensor, video_BThwC: Tensor) -> Tensor:
    """Take `image_BThwC` for independent images, and `video_BThwC` for the other frames."""
    if image_only_BT is None:
        return video_BThwC
    return torch.where(image_only_BT[:, :, None, None, None], image_BThwC, video_BThwC)
