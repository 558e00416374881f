"""Small networks for tests, and checkpoints of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

from svd_ds.model.unet import UNet, UNetConfig
from svd_ds.weights.manifest import COMPLETE, Manifest, compute_digest

SMALL = UNetConfig(
    widths=(32, 64),
    attention_levels=(True, False),
    num_layers=1,
    head_width=32,
    context_width=48,
    scalar_width=32,
    num_frames=8,
)


def image_autoencoder(num_layers: int = 2) -> Any:
    """Build a small autoencoder of Stable Diffusion's class, with random values in every bias."""
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=num_layers,
        sample_size=32,
    )
    for parameter in autoencoder.parameters():
        nn.init.normal_(parameter, mean=0.5 if parameter.dim() == 1 else 0.0, std=0.05)
    return autoencoder.eval()


def assert_same(found: UNet, expected: UNet) -> None:
    """Assert that two networks have the same config and the same parameters, bit for bit."""
    assert found.config == expected.config
    for (name, a), (_, b) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def save_checkpoint(folder: Path, unet: UNet, ranks: int, average: str | None = None) -> None:
    """Write a network as a run saves it: each rank's slice of the flattened, padded parameters."""
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
    """Write the manifest of a checkpoint, after all of its files."""
    names = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
    files = {name: compute_digest(checkpoint / name) for name in names if name != COMPLETE}
    (checkpoint / COMPLETE).write_text(Manifest(token, world_size, True, files).as_json())


def forward_lora(unet: UNet, tokens: int = 3) -> Tensor:
    """Run a network of the config SMALL on fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    x, context = (
        torch.randn(2, 3, 8, 4, 4, generator=generator),
        torch.randn(2, tokens, 48, generator=generator),
    )
    return unet(x, torch.tensor([-0.5, 0.5]), context, torch.rand(2, 3, generator=generator))


def randomize_adapters(unet: UNet, names: list[str]) -> None:
    """Draw random values for adapters."""
    parameters = dict(unet.named_parameters())
    for name in names:
        nn.init.normal_(parameters[name], std=0.1)
