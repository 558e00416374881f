"""CRAFT, the text detector of arXiv 2311.15127, section 3.1: its network, for the weights that its authors
published (arXiv 1904.01941, github.com/clovaai/CRAFT-pytorch), and what becomes of its two maps of scores.

Shape legend: H x W pixels of a frame, h x w of the scores (half of them), C channels.
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

SUFFIXES = (".pth", ".pt", ".safetensors")
"""Of files of weights."""
POOL = 0
VGG16 = (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512)
"""Widths of its convolutions."""
SLICES = (0, 12, 19, 29, 39)
"""Where its layers are parted: the weights' names count them through."""
CELL = 32
"""Sides must be multiples of it."""
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of ImageNet's pixels, red, green and blue."""
LOW_SCORE, LINK_SCORE, LEAST_CELLS = 0.4, 0.4, 10
"""From which a cell belongs to text, or joins its letters, and cells of a box: the authors' choices."""


class Craft(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in VGG16:
            if width == POOL:
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
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

    def forward(self, pixels_1CHW: Tensor) -> Tensor:
        """Normalised RGB -> (1, 2, h, w): how far a cell is a letter's, and between two of a word."""
        seen, x = [], pixels_1CHW
        for part in self.basenet.values():
            x = part(x)
            seen.append(x)
        *skips, deepest, _ = seen
        x = self.upconv1(torch.cat([x, deepest], dim=1))
        for merge, skip in zip((self.upconv2, self.upconv3, self.upconv4), reversed(skips), strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            # The public code's next slice rectifies what it is given in place, and so also what is kept.
            x = merge(torch.cat([x, skip.relu()], dim=1))
        return self.conv_cls(x)


class _Merge(nn.Module):
    def __init__(self, before: int, between: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Conv2d(before, between, 1), nn.BatchNorm2d(between), nn.ReLU()),
            *(nn.Conv2d(between, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@cache
def load(path: Path) -> Craft:
    """One a process. Raises ValueError where the file holds other tensors than CRAFT's."""
    tensors = {name.removeprefix("module."): tensor for name, tensor in load_tensors(path).items()}
    network = Craft()
    if differing := sorted(network.state_dict().keys() ^ tensors.keys()):
        raise ValueError(f"{path} holds no CRAFT: {len(differing)} names differ, as {differing[0]}")
    network.load_state_dict(tensors)
    return network.eval()


@torch.no_grad()
def find_text(network: Craft, frame_HWC: np.ndarray, side: int, min_score: float) -> list[np.ndarray]:
    """Corners (4, 2), x and y, of the boxes of text in a uint8 RGB frame, its shortest side enlarged to
    `side` where it is smaller. Each has somewhere a letter's score of `min_score`."""
    scale = max(1.0, side / min(frame_HWC.shape[:2]))
    larger = cv2.resize(frame_HWC, None, fx=scale, fy=scale)
    height, width = larger.shape[:2]
    padded = cv2.copyMakeBorder(larger, 0, -height % CELL, 0, -width % CELL, cv2.BORDER_CONSTANT)
    normal = (torch.from_numpy(padded).float() - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    letters_hw, links_hw = network(normal.permute(2, 0, 1)[None])[0].numpy()
    return [2 * corners / scale for corners in boxes_of(letters_hw, links_hw, min_score)]


def boxes_of(letters_hw: np.ndarray, links_hw: np.ndarray, min_score: float) -> list[np.ndarray]:
    """The corners of each box, in cells, as the public code's getDetBoxes_core finds them."""
    is_text, is_link = letters_hw > LOW_SCORE, links_hw > LINK_SCORE
    count, label_hw, stats, _ = cv2.connectedComponentsWithStats(
        (is_text | is_link).astype(np.uint8), connectivity=4
    )
    boxes = []
    for label in range(1, count):
        inside = label_hw == label
        width, height, size = (int(stats[label, column]) for column in (2, 3, 4))
        if size < LEAST_CELLS or letters_hw[inside].max() < min_score:
            continue
        # Letters' scores fade towards their edge: grown back by a share of the box's thickness.
        reach = 1 + int(2 * math.sqrt(size * min(width, height) / (width * height)))
        core = (inside & (is_text | ~is_link)).astype(np.uint8)
        grown = cv2.dilate(core, np.ones((reach, reach), dtype=np.uint8))
        points = np.argwhere(grown)[:, ::-1].astype(np.float32)
        boxes.append(cv2.boxPoints(cv2.minAreaRect(points)))
    return boxes
