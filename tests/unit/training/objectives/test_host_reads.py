"""Objectives neither read from the device nor copy to it from memory that is not pinned: both wait.

On a CPU the operators of such reads and copies are seen, though they wait for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from svd_ds.batch import Batch, Clip
from svd_ds.diffusion.noise import KINDS, NoiseConfig, build_noise_schedule
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.conditioner import Conditioner, ConditionerConfig
from svd_ds.model.decoder import build_decoder
from svd_ds.model.perceptual import Perceptual
from svd_ds.model.unet import UNet
from svd_ds.sample import TINY
from svd_ds.training.objectives.base import Objective
from svd_ds.training.objectives.decoder import DecoderLossConfig, DecoderObjective
from svd_ds.training.objectives.diffusion import DiffusionObjective
from svd_ds.training.objectives.discriminator import DiscriminatorTrainer
from tests.host_reads import HostReads
from tests.networks import SMALL
from tests.videos import moving_square


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def clips(*ordinals: int, num_frames: int = 3, size: int = 32) -> Batch:
    made = []
    for ordinal in ordinals:
        frames = torch.from_numpy(moving_square(num_frames, height=size, width=size, seed=ordinal))
        scalars = {"fps": 6.0, "motion_bucket": 100.0, "elevation": 5.0}
        made.append(
            Clip(f"s{ordinal}", ordinal, frames.permute(0, 3, 1, 2).contiguous(), "a square", scalars)
        )
    return Batch.from_clips(made)


def check_step(objective: Objective, net: Callable[..., Tensor], batch: Batch) -> None:
    # The first step makes what is kept, such as the table of noise levels on the device.
    objective.loss(net, objective.draw(batch)).mean().backward()
    objective.discard()
    drawn = objective.draw(batch)
    with HostReads() as reads:
        objective.loss(net, drawn).mean().backward()
        objective.reduce_terms()
    assert reads.places == []


@pytest.mark.parametrize("conditions", ["image", "ends", "text"])
def test_diffusion_objective_does_not_wait(conditions: str) -> None:
    scalars = ("fps", "motion_bucket") if conditions == "text" else ("fps", "motion_bucket", "augmentation")
    concat = "none" if conditions == "text" else conditions
    config = ConditionerConfig(context=conditions, concat=concat, scalars=scalars)
    autoencoder, conditioner = Autoencoder.load(TINY), Conditioner.load(config, TINY)
    channels = 4 + conditioner.concat_channels(autoencoder)
    unet = UNet(
        replace(SMALL, in_channels=channels, masked=conditions == "ends", num_scalars=len(scalars),
                context_width=conditioner.context_width)
    )  # fmt: skip
    for kind in KINDS:
        noise = build_noise_schedule(NoiseConfig(kind=kind), 32, 32)
        check_step(DiffusionObjective(noise, 0.1, autoencoder, conditioner, 0), unet, clips(0, 1))


@pytest.mark.parametrize("start", [0, 5, 9])
def test_decoder_objective_does_not_wait(start: int) -> None:
    """`start`: the discriminator begins before, within and after the batch."""
    autoencoder = Autoencoder.load(TINY)
    decoder, _ = build_decoder(autoencoder.network)
    discriminator = DiscriminatorTrainer(4, 1e-3, seed=0, device=torch.device("cpu"))
    perceptual = Perceptual(widths=(2, 2, 2, 2, 2)).requires_grad_(False)
    config = DecoderLossConfig(adversarial_weight=1.0, adversarial_start=start)
    check_step(DecoderObjective(config, autoencoder, perceptual, discriminator, 0), decoder, clips(4, 5))


@pytest.mark.parametrize(
    "action",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.isfinite().all()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0.5],
        lambda x: x.masked_select(x > 0.5),
        lambda x: x[[0, 1]],
        lambda x: x.new_tensor([1.0, 2.0]),
    ],
)
def test_reads_and_copies_are_seen(action: Callable[[Tensor], Any]) -> None:
    with HostReads() as reads:
        action(torch.rand(4))
    assert reads.places == ["test_host_reads.py:<lambda>"]
