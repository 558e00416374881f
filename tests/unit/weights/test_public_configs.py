"""Configs are converted to the public layouts and back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from svd_ds.model.unet import UNet, UNetConfig
from svd_ds.weights.public_configs import config_from_diffusers, config_from_original, config_to_diffusers
from svd_ds.weights.public_names import public_modules, public_names, to_public

SMALL = UNetConfig(
    widths=(32, 64), attention_levels=(True, False), num_layers=1, head_width=32, scalar_width=32
)


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(),
        SMALL,
        replace(SMALL, transformer_depth=2, num_scalars=5),
        replace(SMALL, in_channels=9, masked=True),
    ],
)
def test_config_round_trip_through_diffusers_is_exact(config: UNetConfig) -> None:
    fields = json.loads(json.dumps(config_to_diffusers(config)))
    assert config_from_diffusers(fields) == config
    assert config_to_diffusers(config_from_diffusers(fields)) == fields


def test_full_model_config_equals_the_diffusers_default() -> None:
    from diffusers import UNetSpatioTemporalConditionModel

    with torch.device("meta"):
        fields = dict(UNetSpatioTemporalConditionModel().config)
    fields["_class_name"] = "UNetSpatioTemporalConditionModel"
    assert config_from_diffusers(fields) == replace(UNetConfig(), num_frames=25)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"in_channels": 4, "num_scalars": 0},
        {"transformer_depth": 2},
        {"in_channels": 9, "masked": True},
    ],
)
def test_config_is_derived_from_the_original_shapes(changes: dict[str, int]) -> None:
    config = replace(UNetConfig(), **changes)
    modules = public_modules(config, "original")
    with torch.device("meta"):
        network = UNet(config)
    shapes = {
        public: to_public(name, part).shape
        for name, parameter in network.named_parameters()
        for names in [public_names(name, modules)]
        for public, part in zip(names, parameter.chunk(len(names)), strict=True)
    }
    assert config_from_original(shapes) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "AutoencoderKL"}, "its class is AutoencoderKL"),
        ({"num_attention_heads": [1, 1]}, r"heads have different widths, \[32, 64\]"),
        ({"layers_per_block": [1, 2]}, r"layers_per_block differs from level to level, \[1, 2\]"),
        ({"_class_name": "UNet2DConditionModel"}, "its use_linear_projection is false"),
    ],
)
def test_networks_without_a_config_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_from_diffusers(config_to_diffusers(SMALL) | changes)
