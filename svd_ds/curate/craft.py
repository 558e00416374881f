"""CRAFT, the text detector of arXiv 2311.15127, section 3.1: the network for its authors' published weights
(arXiv 1904.01941, github.com/clovaai/CRAFT-pytorch), and the boxes from its two score maps.

Shape legend: H x W pixels of a frame, h x w of the score maps (half of H x W), C channels.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svd_ds.curate.models import load_tensors

WEIGHT_SUFFIXES = (".pth", ".pt", ".safetensors")
"""Suffixes of weight files."""
POOL = 0
VGG16 = (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512)
"""Widths of the convolutions of VGG-16, with pooling layers between."""
SLICES = (0, 12, 19, 29, 39)
"""Indices of the layers at which the network is split; tensor names contain the indices."""
CELL = 32
"""Sides of the input are padded to multiples of this number of pixels."""
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""ImageNet's mean and standard deviation of red, green and blue."""
LOW_SCORE, LINK_SCORE, MIN_CELLS = 0.4, 0.4, 10
"""Thresholds of the authors: score of a text cell, score of a link cell, number of cells in a box."""


class Craft(nn.Module):
    """CRAFT's network."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        in_channels = 3
        for width in VGG16:
            if width == POOL:
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                in_channels = width
        self.basenet = nn.ModuleDict()
        for number, begin in enumerate(SLICES[:-1]):
            named = OrderedDict((str(i), layers[i]) for i in range(begin, SLICES[number + 1]))
            self.basenet[f"slice{number + 1}"] = nn.Sequential(named)
        self.basenet["slice5"] = nn.Sequential(
            nn.MaxPool2d(3, 1, 1), nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.Conv2d(1024, 1024, 1)
        )
        self.upconv1 = _Merge(1024 + 512, 512, 256)
        self.upconv2 = _Merge(256 + 512, 256, 128)
        self.upconv3 = _Merge(128 + 256, 128, 64)
        self.upconv4 = _Merge(64 + 128, 64, 32)
        self.conv_cls = nn.Sequential(
            *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU()),
            nn.Conv2d(16, 2, 1),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute score maps.

        Args:
            pixels: normalised RGB, (1, 3, H, W).

        Returns:
            (1, 2, h, w): scores of letters, and of links between letters of a word.
        """
        features, x = [], pixels
        for part in self.basenet.values():
            x = part(x)
            features.append(x)
        *skips, deepest, _ = features
        x = self.upconv1(torch.cat([x, deepest], dim=1))
        for merge, skip in zip((self.upconv2, self.upconv3, self.upconv4), reversed(skips), strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            # The public code's next slice applies ReLU in place, and so changes the skip connection too.
            x = merge(torch.cat([x, skip.relu()], dim=1))
        return self.conv_cls(x)


class _Merge(nn.Module):
    """Block of the decoder that merges features with a skip connection."""

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Conv2d(in_channels, hidden_channels, 1), nn.BatchNorm2d(hidden_channels), nn.ReLU()),
            *(
                nn.Conv2d(hidden_channels, out_channels, 3, padding=1),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
            ),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@cache
def load_craft(path: Path) -> Craft:
    """Load CRAFT, once per process.

    Raises:
        ValueError: the file holds other tensors than CRAFT's.
    """
    tensors = {name.removeprefix("module."): tensor for name, tensor in load_tensors(path).items()}
    network = Craft()
    if differing := sorted(network.state_dict().keys() ^ tensors.keys()):
        raise ValueError(
            f"{path} is not a file of CRAFT weights: {len(differing)} names differ, such as {differing[0]}"
        )
    network.load_state_dict(tensors)
    return network.eval()


@torch.no_grad()
def find_text(network: Craft, frame: np.ndarray, side: int, min_score: float) -> list[np.ndarray]:
    """Find text boxes in a frame.

    Args:
        network: CRAFT.
        frame: uint8 RGB; enlarged if its shortest side is less than `side` pixels.
        side: minimum shortest side in pixels.
        min_score: minimum of a box's highest letter score.

    Returns:
        Corners of each box, (4, 2), as x and y.
    """
    scale = max(1.0, side / min(frame.shape[:2]))
    larger = cv2.resize(frame, None, fx=scale, fy=scale)
    height, width = larger.shape[:2]
    padded = cv2.copyMakeBorder(larger, 0, -height % CELL, 0, -width % CELL, cv2.BORDER_CONSTANT)
    normal = (torch.from_numpy(padded).float() - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    letters_hw, links_hw = network(normal.permute(2, 0, 1)[None])[0].numpy()
    return [2 * corners / scale for corners in find_boxes(letters_hw, links_hw, min_score)]


def find_boxes(letters_hw: np.ndarray, links_hw: np.ndarray, min_score: float) -> list[np.ndarray]:
    """Find the boxes of words in the score maps, like getDetBoxes_core of the public code.

    Args:
        letters_hw: scores of letters, (h, w).
        links_hw: scores of links between letters, (h, w).
        min_score: minimum of a box's highest letter score.

    Returns:
        Corners of each box, (4, 2), as x and y in cells of the maps.
    """
    is_text, is_link = letters_hw > LOW_SCORE, links_hw > LINK_SCORE
    count, label_hw, stats, _ = cv2.connectedComponentsWithStats(
        (is_text | is_link).astype(np.uint8), connectivity=4
    )
    boxes = []
    for label in range(1, count):
        inside = label_hw == label
        width, height, size = (int(stats[label, column]) for column in (2, 3, 4))
        if size < MIN_CELLS or letters_hw[inside].max() < min_score:
            continue
        # Scores decrease towards the edge of a letter: the box is grown by a fraction of its thickness.
        reach = 1 + int(2 * math.sqrt(size * min(width, height) / (width * height)))
        core = (inside & (is_text | ~is_link)).astype(np.uint8)
        grown = cv2.dilate(core, np.ones((reach, reach), dtype=np.uint8))
        points = np.argwhere(grown)[:, ::-1].astype(np.float32)
        boxes.append(cv2.boxPoints(cv2.minAreaRect(points)))
    return boxes
