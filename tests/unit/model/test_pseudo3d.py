"""Make-A-Video's temporal layers: they start as the identity, and mix frames after training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from svd_ds.model.unet import UNet, parameter_tags
from svd_ds.weights.io import load_unet, save_unet
from tests.networks import SMALL

SVD = replace(SMALL, num_scalars=0)
CONFIG = replace(SVD, temporal="make_a_video")
NUM_FRAMES = 3


@pytest.fixture
def unet() -> UNet:
    """A network that starts from a trained image model: random values except in the temporal layers."""
    unet = UNet(CONFIG)
    tags = parameter_tags(unet)
    for name, parameter in unet.named_parameters():
        if tags[name] != "temporal":
            nn.init.normal_(parameter, std=0.1)
    return unet


def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, NUM_FRAMES, 8, 4, 4, generator=generator)
    context = torch.randn(2, 3, 48, generator=generator)
    return x, torch.tensor([-0.5, 0.5]), context, torch.zeros(2, 0)


def image_only(value: bool) -> Tensor:
    return torch.full((2, NUM_FRAMES), value)


def test_network_starts_as_the_image_model_bit_for_bit(unet: UNet) -> None:
    clip = inputs()
    output = unet(*clip)
    assert output.std() > 0.1
    assert torch.equal(output, unet(*clip, image_only(True)))
    svd = UNet(SVD)
    svd.load_state_dict(unet.state_dict(), strict=False)
    torch.testing.assert_close(svd(*clip, image_only(True)), output, rtol=1e-5, atol=1e-5)


def test_spatial_parameters_have_the_names_of_svd(unet: UNet) -> None:
    def image_half(network: UNet) -> dict[str, str]:
        return {name: tag for name, tag in parameter_tags(network).items() if tag != "temporal"}

    assert image_half(unet) == image_half(UNet(SVD))
    assert unet.blocks().keys() == UNet(SVD).blocks().keys()


def test_every_temporal_layer_gets_gradients_and_mixes_frames(
    unet: UNet, randomize: Callable[[nn.Module], nn.Module]
) -> None:
    randomize(unet)
    clip = inputs()
    before = unet(*clip)
    before.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in unet.parameters())

    other = clip[0].clone()
    other[:, 2] += 1
    with torch.no_grad():
        assert not torch.allclose(unet(other, *clip[1:])[:, 0], before[:, 0])
        alone, images = unet(other, *clip[1:], image_only(True)), unet(*clip, image_only(True))
        assert torch.equal(alone[:, :2], images[:, :2]), "an image does not see its neighbours"
        assert not torch.allclose(images, before)
        assert torch.equal(unet(*clip, image_only(False)), before)


def test_weights_of_an_image_model_are_loaded(
    unet: UNet, image_unet: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image_unet(SVD).save_pretrained(tmp_path / "unet")
    loaded = load_unet(tmp_path, config=CONFIG)
    assert "get initial values" in caplog.text
    assert torch.equal(loaded(*inputs()), loaded(*inputs(), image_only(True)))


@pytest.mark.parametrize(("layout", "name"), [("diffusers", "folder"), ("original", "x.safetensors")])
def test_saving_in_a_public_layout_is_refused(unet: UNet, layout: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.temporal is make_a_video: no public layout"):
        save_unet(unet, tmp_path / name, layout)
    assert not (tmp_path / name).exists()


def test_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="temporal is 'mochi': it must be one of svd, make_a_video, none"):
        replace(SVD, temporal="mochi")
