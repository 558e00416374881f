"""Names, shapes and counts of public tensors in both layouts."""

from __future__ import annotations

import gzip
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svd_ds.model.unet import UNet, UNetConfig, parameter_tags
from svd_ds.weights.public_configs import config_to_diffusers
from svd_ds.weights.public_names import public_modules, public_names, to_public

DATA = Path(__file__).parent / "data"
FULL = UNetConfig()


def meta(config: UNetConfig) -> UNet:
    with torch.device("meta"):
        return UNet(config)


def public_tensors(config: UNetConfig, layout: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every public tensor; each is named once."""
    modules = public_modules(config, layout)
    tensors: dict[str, tuple[int, ...]] = {}
    for name, parameter in meta(config).named_parameters():
        names = public_names(name, modules)
        assert not tensors.keys() & set(names)
        tensors |= {
            public: tuple(to_public(name, part).shape)
            for public, part in zip(names, parameter.chunk(len(names)), strict=True)
        }
    return tensors


def test_names_and_shapes_of_the_full_model() -> None:
    from diffusers import UNetSpatioTemporalConditionModel

    with torch.device("meta"):
        public = UNetSpatioTemporalConditionModel.from_config(config_to_diffusers(FULL))
    expected = {name: tuple(tensor.shape) for name, tensor in public.state_dict().items()}
    assert public_tensors(FULL, "diffusers") == expected


def test_names_and_shapes_of_the_original() -> None:
    """The list is of sgm's VideoUNet with the config of the released models (configs/inference/svd.yaml)."""
    lines = gzip.decompress((DATA / "original-tensors.tsv.gz").read_bytes()).decode().split()
    expected = {
        name: tuple(map(int, shape.split("x"))) for name, shape in zip(lines[::2], lines[1::2], strict=True)
    }
    assert len(expected) == 1428
    assert public_tensors(FULL, "original") == expected


@pytest.mark.parametrize(
    ("changes", "num_parameters", "num_tensors"),
    [
        ({}, 1_524_623_082, 1428),
        ({"in_channels": 4, "num_scalars": 0}, 1_521_987_562, 1424),
        ({"in_channels": 4, "num_scalars": 2}, 1_524_283_882, 1428),
        ({"in_channels": 9, "num_scalars": 2}, 1_524_298_282, 1428),
        ({"in_channels": 9, "masked": True}, 1_524_625_966, 1429),
        ({"num_scalars": 1}, 1_523_967_722, 1428),
        ({"num_scalars": 5}, 1_525_278_442, 1428),
    ],
)
def test_counts_of_the_full_model(changes: dict[str, int], num_parameters: int, num_tensors: int) -> None:
    config = replace(FULL, **changes)
    unet = meta(config)
    tags = parameter_tags(unet)
    counts: Counter[str] = Counter()
    for name, parameter in unet.named_parameters():
        counts[tags[name]] += parameter.numel()
    assert counts.total() == num_parameters
    assert counts["temporal"] == 656_076_838
    if config.in_channels == 4:
        assert counts["spatial"] + counts["embedding"] == 865_910_724  # Stable Diffusion 2.1
    assert len(public_tensors(config, "original")) == num_tensors
