"""A small network for tests of weights, one in a checkpoint, and what it means that two are the same."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from svd_ds.model.unet import UNet, UNetConfig
from svd_ds.weights.manifest import COMPLETE, Manifest, digest_of

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


def save_checkpoint(folder: Path, unet: UNet, ranks: int, average: str | None = None) -> None:
    """As a run saves it: each rank's slice of the flattened, padded parameter."""
    slices = folder / (f"ema-{average}" if average else "unet")
    slices.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        shard = {}
        for name, parameter in unet.named_parameters():
            flat = parameter.detach().flatten()
            length = -(-len(flat) // ranks)
            padded = torch.cat([flat, torch.full((length * ranks - len(flat),), torch.nan)])
            shard[name] = padded[rank * length : (rank + 1) * length].clone()
        save_file(shard, slices / f"rank-{rank:05d}-of-{ranks:05d}.safetensors")
    if not average:
        (slices / "config.json").write_text(json.dumps(asdict(unet.config)))
    seal(folder, world_size=ranks)


def seal(checkpoint: Path, token: str = "", world_size: int = 1) -> None:
    """Write the manifest of a checkpoint whose files are all there."""
    names = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
    files = {name: digest_of(checkpoint / name) for name in names if name != COMPLETE}
    (checkpoint / COMPLETE).write_text(Manifest(token, world_size, True, files).as_json())
