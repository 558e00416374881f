"""Fixtures of reference networks: diffusers' UNets, with random weights in every tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from svd_ds.model.ops import fused
from svd_ds.model.unet import UNet, UNetConfig
from svd_ds.weights.public_configs import config_to_diffusers
from svd_ds.weights.public_names import from_public as from_public_order
from svd_ds.weights.public_names import public_modules, public_names
from tests.networks import SMALL


@pytest.fixture(autouse=True)
def use_kernels_of_large_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute small tensors as large ones and GPUs do."""
    monkeypatch.setattr(fused, "SMALL_NUMEL", 0)


@pytest.fixture
def randomize() -> Callable[[nn.Module], nn.Module]:
    """Fill every parameter with random values, including mix factors and zeros."""

    def fill(module: nn.Module) -> nn.Module:
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.05)
            else:
                nn.init.normal_(parameter, mean=0.5, std=0.5)
        return module

    return fill


@pytest.fixture
def unet(randomize: Callable[[nn.Module], UNet]) -> UNet:
    """A small network with random values."""
    return randomize(UNet(SMALL))


@pytest.fixture
def public_unet(randomize: Callable[[nn.Module], nn.Module]) -> Callable[[UNetConfig], Any]:
    """diffusers' video UNet of a config."""
    from diffusers import UNetSpatioTemporalConditionModel

    return lambda config: randomize(UNetSpatioTemporalConditionModel.from_config(config_to_diffusers(config)))


@pytest.fixture
def image_unet(randomize: Callable[[nn.Module], nn.Module]) -> Callable[[UNetConfig], Any]:
    """diffusers' image UNet with the spatial half of a config: Stable Diffusion 2's kind."""
    from diffusers import UNet2DConditionModel

    def build(config: UNetConfig) -> nn.Module:
        kinds = ["CrossAttn" if attends else "" for attends in config.attention_levels]
        return randomize(
            UNet2DConditionModel(
                in_channels=config.in_channels,
                out_channels=config.out_channels,
                down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
                up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
                block_out_channels=config.widths,
                layers_per_block=config.num_layers,
                cross_attention_dim=config.context_width,
                attention_head_dim=[width // config.head_width for width in config.widths],
                use_linear_projection=True,
            )
        )

    return build


@pytest.fixture
def from_public() -> Callable[[UNetConfig, dict[str, Tensor]], dict[str, Tensor]]:
    """Convert tensors under diffusers' names (weights or gradients) to ours."""

    def convert(config: UNetConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        modules = public_modules(config, "diffusers")
        with torch.device("meta"):
            names = [name for name, _ in UNet(config).named_parameters()]
        return {
            name: from_public_order(
                name, torch.cat([tensors[public] for public in public_names(name, modules)])
            )
            for name in names
        }

    return convert
