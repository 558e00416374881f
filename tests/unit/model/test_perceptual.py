"""The perceptual distance, with small random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from svd_ds.model.perceptual import Perceptual

WIDTHS = (4, 5, 6, 7, 8)
INDICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Indices of the convolutions in torchvision's vgg16().features."""


def made_weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights of VGG16 and of its heads, with torchvision's and LPIPS' names."""
    features, width = {"classifier.0.weight": torch.zeros(2, 2)}, 3
    for places, wider in zip(INDICES, WIDTHS, strict=True):
        for place in places:
            features[f"features.{place}.weight"] = torch.randn(wider, width, 3, 3) * 0.3
            features[f"features.{place}.bias"] = torch.randn(wider) * 0.1
            width = wider
    heads = {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) for i, w in enumerate(WIDTHS)}
    return features, heads


def write(folder: Path, features: dict[str, Tensor], heads: dict[str, Tensor]) -> tuple[Path, Path]:
    save_file(features, folder / "vgg16.safetensors")
    save_file(heads, folder / "heads.safetensors")
    return folder / "vgg16.safetensors", folder / "heads.safetensors"


def straightforward(a: Tensor, b: Tensor, features: dict[str, Tensor], heads: dict[str, Tensor]) -> Tensor:
    """LPIPS' own formulation: torchvision's layers 0 to 29 in order, with an output after each group."""
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    distance = torch.zeros(len(a))
    states = [((x + 1) / 2 - mean) / deviation for x in (a, b)]
    for group, places in enumerate(INDICES):
        for place in places:
            weight, bias = features[f"features.{place}.weight"], features[f"features.{place}.bias"]
            states = [F.conv2d(x, weight, bias, padding=1).clamp(min=0) for x in states]
        units = [x / (torch.linalg.norm(x, dim=1, keepdim=True) + 1e-10) for x in states]
        head = heads[f"lin{group}.model.1.weight"]
        distance += ((units[0] - units[1]) ** 2 * head).sum(dim=1).mean(dim=(1, 2))
        states = [F.max_pool2d(x, 2) for x in states]
    return distance


def test_distance_equals_lpips(tmp_path: Path) -> None:
    features, heads = made_weights()
    files = write(tmp_path, features, heads)
    a, b = torch.rand(2, 2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        ours = Perceptual.load(*files, widths=WIDTHS)(a, b)
        unweighted = Perceptual.load(files[0], widths=WIDTHS)(a, b)
    # LPIPS rounds its shift and scale to three digits.
    assert torch.allclose(ours, straightforward(a, b, features, heads), rtol=0.02)
    ones = {name: torch.ones_like(head) for name, head in heads.items()}
    assert torch.allclose(unweighted, straightforward(a, b, features, ones), rtol=0.02)


def test_distance_of_equal_images_is_zero_with_a_finite_gradient(tmp_path: Path) -> None:
    network = Perceptual.load(*write(tmp_path, *made_weights()), widths=WIDTHS)
    a = torch.rand(1, 3, 16, 16)
    b = a.clone().requires_grad_()
    distance = network(b, a)
    distance.sum().backward()
    assert distance.item() == 0
    assert b.grad is not None and b.grad.isfinite().all()
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_wrong_files_are_refused_with_both_shapes(tmp_path: Path) -> None:
    features, heads = made_weights()
    files = write(tmp_path, features, heads)
    with pytest.raises(
        ValueError, match=r"features\.0\.weight has the shape \(4, 3, 3, 3\).*\(64, 3, 3, 3\)"
    ):
        Perceptual.load(files[0])
    with pytest.raises(ValueError, match=r"lacks lin0\.model\.1\.weight, of shape \(1, 4, 1, 1\)"):
        Perceptual.load(files[0], files[0], widths=WIDTHS)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Perceptual.load(tmp_path / "nowhere")
    (tmp_path / "text").write_text("not weights")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        Perceptual.load(tmp_path / "text")
