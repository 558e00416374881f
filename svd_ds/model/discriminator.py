"""Tells real clips from decoded ones, a patch at a time: 3-D convolutions over space and time.

VideoLDM has such a one for its decoder (arXiv 2304.08818 section 3.1.1) and gives no sizes. The kernels and
the first level without a norm are PatchGAN's (arXiv 1611.07004).

Shape legend: B clips, T frames, C channels, H x W pixels.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

NUM_LEVELS = 3
"""Halvings of the picture: a score sees 38 x 38 pixels of nine frames."""


class Discriminator(nn.Module):
    """Scores depend on the clip alone, not on the batch around it: its norms are over the clip."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = [3] + [width * 2**level for level in range(NUM_LEVELS)]
        self.down = nn.ModuleList(
            nn.Conv3d(a, b, (3, 4, 4), stride=(1, 2, 2), padding=1) for a, b in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in widths[2:])
        self.score = nn.Conv3d(widths[-1], 1, 3, padding=1)

    def forward(self, frames_BTCHW: Tensor) -> Tensor:
        """From frames in [-1, 1], (B, T, 3, H, W), with sides of at least 8, the scores of patches, high for
        real ones: (B, patches)."""
        h = frames_BTCHW.transpose(1, 2)
        for level, convolution in enumerate(self.down):
            h = convolution(h)
            if level > 0:
                h = self.norms[level - 1](h)
            h = F.leaky_relu(h, 0.2)
        return self.score(h).flatten(1)


def hinge(real: Tensor, made: Tensor) -> Tensor:
    """The discriminator's loss a clip, (B,), from its scores of real and of made clips (arXiv 1705.02894)."""
    return 0.5 * (F.relu(1 - real).mean(dim=1) + F.relu(1 + made).mean(dim=1))
