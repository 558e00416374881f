"""The network without temporal layers is the image path of the video network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from svd_ds.model.unet import UNet, parameter_tags
from svd_ds.weights.io import load_unet, save_unet
from tests.networks import SMALL

IMAGE = replace(SMALL, in_channels=4, num_scalars=0, temporal="none")


def test_video_network_equals_the_image_network_on_images(randomize: Callable[[nn.Module], UNet]) -> None:
    image, video = randomize(UNet(IMAGE)), UNet(replace(IMAGE, temporal="svd"))
    missing, unexpected = video.load_state_dict(image.state_dict(), strict=False)
    assert not unexpected and {parameter_tags(video)[name] for name in missing} == {"temporal"}
    inputs = torch.randn(2, 3, 4, 8, 8), torch.randn(2), torch.randn(2, 5, 48), torch.zeros(2, 0)
    images = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(video(*inputs, images), image(*inputs))


def test_frames_are_independent(randomize: Callable[[nn.Module], UNet]) -> None:
    unet = randomize(UNet(IMAGE))
    x, *others = torch.randn(1, 3, 4, 8, 8), torch.randn(1), torch.randn(1, 5, 48), torch.zeros(1, 0)
    torch.testing.assert_close(unet(x, *others)[:, 1:2], unet(x[:, 1:2], *others))


def test_image_network_is_saved_in_the_original_layout_only(
    randomize: Callable[[nn.Module], UNet], tmp_path: Path
) -> None:
    unet = randomize(UNet(IMAGE))
    save_unet(unet, tmp_path / "image.safetensors", "original")
    found = load_unet(tmp_path / "image.safetensors")
    assert found.config == IMAGE
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), unet.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"model.temporal is none, .* has temporal layers"):
        save_unet(UNet(replace(IMAGE, num_scalars=1)), tmp_path / "unet")
