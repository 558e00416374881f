"""The discriminator of the decoder's adversarial loss: scores of patches in space and time.

VideoLDM trains its decoder with a patch-wise temporal discriminator of 3-D convolutions (arXiv 2304.08818
section 3.1.1) and gives no sizes. The kernels, and the first level without a norm, are PatchGAN's
(arXiv 1611.07004).

Shape legend: B clips, T frames, C channels, H x W pixels.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

NUM_LEVELS = 3
"""Number of levels, each of which halves height and width: a score sees 38 x 38 pixels of nine frames."""


class Discriminator(nn.Module):
    """Patch discriminator; its norms are over one clip, so scores do not depend on the rest of the batch."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = [3] + [width * 2**level for level in range(NUM_LEVELS)]
        self.down = nn.ModuleList(
            nn.Conv3d(a, b, (3, 4, 4), stride=(1, 2, 2), padding=1) for a, b in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in widths[2:])
        self.score = nn.Conv3d(widths[-1], 1, 3, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        """Score clips.

        Args:
            frames: in [-1, 1], (B, T, 3, H, W), with sides of at least 8 pixels.

        Returns:
            Scores, high for real clips: (B, patches).
        """
        h_BCTHW = frames.transpose(1, 2)
        for level, convolution in enumerate(self.down):
            h_BCTHW = convolution(h_BCTHW)
            if level > 0:
                h_BCTHW = self.norms[level - 1](h_BCTHW)
            h_BCTHW = F.leaky_relu(h_BCTHW, 0.2)
        return self.score(h_BCTHW).flatten(1)


def hinge_loss(real: Tensor, generated: Tensor) -> Tensor:
    """Compute the hinge loss of a discriminator (arXiv 1705.02894).

    Args:
        real: scores of real clips, (B, patches).
        generated: scores of generated clips, (B, patches).

    Returns:
        The loss of each clip, (B,).
    """
    return 0.5 * (F.relu(1 - real).mean(dim=1) + F.relu(1 + generated).mean(dim=1))
