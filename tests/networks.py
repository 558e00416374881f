"""A small network for tests of weights, and what it means that two are the same."""

from __future__ import annotations

import torch

from svd_ds.model.unet import UNet, UNetConfig

SMALL = UNetConfig(
    widths=(32, 64),
    attention_levels=(True, False),
    num_layers=1,
    head_width=32,
    context_width=48,
    scalar_width=32,
    num_frames=8,
)


def assert_same(found: UNet, expected: UNet) -> None:
    assert found.config == expected.config
    for (name, ours), (_, theirs) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
