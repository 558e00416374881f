"""The perceptual distance LPIPS (arXiv 1801.03924), on features of VGG16 (arXiv 1409.1556).

No weights are shipped. They come from two safetensors files: the state dict of torchvision's VGG16
(`features.0.weight`, ...; its classifier is not read), and the linear heads of LPIPS for it
(`lin0.model.1.weight`, ...). Without heads every channel has the weight 1, as in LPIPS' own baseline.

Shape legend: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svd_ds.tensor_files import open_tensors

WIDTHS = (64, 128, 256, 512, 512)
"""Channels of VGG16's five groups of convolutions; images are halved between groups."""
DEPTHS = (2, 2, 3, 3, 3)
"""Convolutions of each group."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and deviation of each colour in VGG16's training images, for values in [-1, 1] (from LPIPS)."""
EPS = 1e-10


class Perceptual(nn.Module):
    """LPIPS: squared differences of normalized features after each group, weighted and averaged over pixels
    (arXiv 1801.03924)."""

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
        """Load a frozen network, float32 on the CPU.

        Args:
            path: file of VGG16.
            heads: file of the linear heads; None: every channel has the weight 1.
            widths: channels of the groups of convolutions.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file lacks a tensor, or has it in another shape.
        """
        network = Perceptual(widths)
        _load_parameters(_public_names(network), Path(path))
        if heads is not None:
            parameters = {f"lin{i}.model.1.weight": head for i, head in enumerate(network.heads)}
            _load_parameters(parameters, Path(heads))
        return network.eval().requires_grad_(False)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Compute the distances of pairs of images.

        Args:
            images: in [-1, 1], (N, 3, H, W), with sides of at least 16 pixels.
            references: likewise.

        Returns:
            Distances, (N,).
        """
        a_NCHW, b_NCHW = ((x - self.shift) / self.scale for x in (images, references))
        distance_N = a_NCHW.new_zeros(len(a_NCHW))
        convolutions = iter(self.convolutions)
        for group, (depth, head) in enumerate(zip(DEPTHS, self.heads, strict=True)):
            if group > 0:
                a_NCHW, b_NCHW = F.max_pool2d(a_NCHW, 2), F.max_pool2d(b_NCHW, 2)
            for convolution in islice(convolutions, depth):
                a_NCHW, b_NCHW = F.relu(convolution(a_NCHW)), F.relu(convolution(b_NCHW))
            difference_NCHW = (_normalize(a_NCHW) - _normalize(b_NCHW)).square()
            distance_N = distance_N + F.conv2d(difference_NCHW, head).mean(dim=(1, 2, 3))
        return distance_N


def _normalize(features_NCHW: Tensor) -> Tensor:
    # The square root has no gradient at 0, and ReLU makes all channels of some pixels 0.
    norm = (features_NCHW.square().sum(dim=1, keepdim=True) + EPS**2).sqrt()
    return features_NCHW / (norm + EPS)


def _public_names(network: Perceptual) -> dict[str, Tensor]:
    """Return torchvision's name -> our parameter; torchvision also counts the ReLUs and poolings."""
    groups = (group for group, depth in enumerate(DEPTHS) for _ in range(depth))
    indices = [2 * i + group for i, group in enumerate(groups)]
    return {
        f"features.{index}.{name}": value
        for index, convolution in zip(indices, network.convolutions, strict=True)
        for name, value in convolution.named_parameters()
    }


@torch.no_grad()
def _load_parameters(parameters: dict[str, Tensor], path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of perceptual weights {path}")
    tensors = open_tensors(path)
    for name, parameter in parameters.items():
        if name not in tensors:
            raise ValueError(f"{path} lacks {name}, of shape {tuple(parameter.shape)}")
        if tensors[name].shape != tuple(parameter.shape):
            raise ValueError(
                f"{path}: {name} has the shape {tensors[name].shape}, and the network takes "
                f"{tuple(parameter.shape)}"
            )
        parameter.copy_(tensors[name].read())
