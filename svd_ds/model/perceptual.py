"""How different two pictures look: LPIPS (arXiv 1801.03924), on VGG16's features (arXiv 1409.1556).

The weights are yours: a torchvision VGG16's state dict as safetensors (`features.0.weight`, ...; of its
classifier nothing is read), and LPIPS' linear heads for it (`lin0.model.1.weight`, ...). Without heads every
channel counts one, as in LPIPS' own baseline.

Shape legend: N pictures, C channels, H x W pixels.
"""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svd_ds.weights.shards import tensors_of

WIDTHS = (64, 128, 256, 512, 512)
"""Channels of VGG16's five groups of convolutions; pictures are halved between groups."""
DEPTHS = (2, 2, 3, 3, 3)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""From [-1, 1] to what VGG16 was trained on: ImageNet's mean and deviation of each colour (LPIPS' own)."""
TINY = 1e-10


class Perceptual(nn.Module):
    """The LPIPS distance: differences of unit features after each group, weighted, averaged over pixels."""

    shift: Tensor
    scale: Tensor

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        channels = [3] + [width for width, depth in zip(widths, DEPTHS, strict=True) for _ in range(depth)]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(channels))
        self.heads = nn.ParameterList(torch.ones(1, width, 1, 1) for width in widths)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])

    @staticmethod
    def load(
        path: str | Path, heads: str | Path | None = None, widths: tuple[int, ...] = WIDTHS
    ) -> Perceptual:
        """Frozen, float32, on the CPU.

        Raises FileNotFoundError where there is no such file, ValueError where it lacks a tensor or has it in
        another shape, with both.
        """
        network = Perceptual(widths)
        _fill(_public_names(network), Path(path))
        if heads is not None:
            _fill({f"lin{i}.model.1.weight": head for i, head in enumerate(network.heads)}, Path(heads))
        return network.eval().requires_grad_(False)

    def forward(self, ours_NCHW: Tensor, theirs_NCHW: Tensor) -> Tensor:
        """Distances, (N,), of pictures in [-1, 1], (N, 3, H, W), whose sides are at least 16."""
        ours, theirs = ((x - self.shift) / self.scale for x in (ours_NCHW, theirs_NCHW))
        distance_N = ours.new_zeros(len(ours))
        rest = iter(self.convolutions)
        for i, (depth, head) in enumerate(zip(DEPTHS, self.heads, strict=True)):
            if i > 0:
                ours, theirs = F.max_pool2d(ours, 2), F.max_pool2d(theirs, 2)
            for convolution in islice(rest, depth):
                ours, theirs = F.relu(convolution(ours)), F.relu(convolution(theirs))
            difference = (_unit(ours) - _unit(theirs)).square()
            distance_N = distance_N + F.conv2d(difference, head).mean(dim=(1, 2, 3))
        return distance_N


def _unit(features_NCHW: Tensor) -> Tensor:
    # The square root has no gradient at 0, where ReLU leaves whole pixels.
    norm = (features_NCHW.square().sum(dim=1, keepdim=True) + TINY**2).sqrt()
    return features_NCHW / (norm + TINY)


def _public_names(network: Perceptual) -> dict[str, Tensor]:
    """torchvision's name -> our parameter: it counts convolutions, ReLUs and poolings in one row."""
    places = [2 * i + group for i, group in enumerate(g for g, d in enumerate(DEPTHS) for _ in range(d))]
    return {
        f"features.{place}.{name}": value
        for place, convolution in zip(places, network.convolutions, strict=True)
        for name, value in convolution.named_parameters()
    }


@torch.no_grad()
def _fill(parameters: dict[str, Tensor], path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of perceptual weights {path}")
    tensors = tensors_of(path)
    for name, parameter in parameters.items():
        if name not in tensors:
            raise ValueError(f"{path} lacks {name}, of shape {tuple(parameter.shape)}")
        if tensors[name].shape != tuple(parameter.shape):
            raise ValueError(
                f"{path}: {name} has the shape {tensors[name].shape}, and the network takes "
                f"{tuple(parameter.shape)}"
            )
        parameter.copy_(tensors[name].read())
