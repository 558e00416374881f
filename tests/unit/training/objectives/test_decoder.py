"""Objective of the decoder with its discriminator, and bitwise resume of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from svd_ds.batch import Batch, Clip
from svd_ds.model.autoencoder import Autoencoder, posterior
from svd_ds.model.decoder import build_decoder
from svd_ds.model.perceptual import Perceptual
from svd_ds.sample import TINY
from svd_ds.training.objectives.decoder import (
    DecoderLossConfig,
    DecoderObjective,
    ReconstructionPreview,
    psnr,
)
from svd_ds.training.objectives.discriminator import DiscriminatorTrainer
from tests.videos import moving_square


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return Autoencoder.load(TINY)


def clips(*ordinals: int, size: int = 32) -> Batch:
    made = []
    for ordinal in ordinals:
        frames = torch.from_numpy(moving_square(2, height=size, width=size, seed=ordinal)).permute(0, 3, 1, 2)
        made.append(Clip(f"s{ordinal}", ordinal, frames.contiguous(), "", {}))
    return Batch.from_clips(made)


def decoder_objective(autoencoder: Autoencoder, perceptual: Any = None, **settings: Any) -> DecoderObjective:
    config = DecoderLossConfig(discriminator_width=4, **settings)
    discriminator = (
        DiscriminatorTrainer(4, 1e-3, seed=0, device=torch.device("cpu"))
        if config.adversarial_weight
        else None
    )
    return DecoderObjective(config, autoencoder, perceptual, discriminator, seed=0)


def end_step(objective: DecoderObjective) -> dict[str, float]:
    """End a step as the loop does, which reads the terms from the device."""
    return objective.end_step({name: value.item() for name, value in objective.reduce_terms().items()})


class Painter:
    """Network that outputs one colour and records its latents."""

    def __init__(self, colour: float) -> None:
        self.colour = torch.tensor(colour, requires_grad=True)

    def __call__(self, latents: Tensor) -> Tensor:
        self.latents = latents
        B, T, _, h, w = latents.shape
        return self.colour.expand(B, T, 3, 8 * h, 8 * w)


def test_loss_is_the_sum_of_its_terms(autoencoder: Autoencoder) -> None:
    batch, net = clips(3, 9), Painter(0.25)
    perceptual = Perceptual(widths=(2, 2, 2, 2, 2)).requires_grad_(False)
    objective = decoder_objective(autoencoder, perceptual, perceptual_weight=0.5)
    loss_B = objective.loss(net, batch)
    real = batch.frames_BTCHW / 127.5 - 1
    pixels = (real - 0.25).abs().mean(dim=(1, 2, 3, 4))
    distance = perceptual(torch.full((4, 3, 32, 32), 0.25), real.flatten(0, 1)).view(2, 2).mean(dim=1)
    assert torch.allclose(loss_B, pixels + 0.5 * distance, rtol=1e-5)
    assert end_step(objective) == pytest.approx(
        {"reconstruction": pixels.mean().item(), "perceptual": distance.mean().item()}, rel=1e-5
    )
    assert torch.autograd.grad(loss_B.sum(), net.colour)[0] != 0

    moments = autoencoder.encode(real.flatten(0, 1))
    spread = (net.latents.flatten(0, 1) - posterior(moments)) / torch.exp(0.5 * moments[:, 4:])
    assert 0.8 < spread.std() < 1.2, "the posterior is sampled, and not scaled"
    latents = net.latents
    objective.loss(net, clips(9))
    assert torch.allclose(net.latents[0], latents[1], atol=1e-4), "and depends on the clip only"


def test_one_clip_can_be_overfitted(autoencoder: Autoencoder) -> None:
    decoder, _ = build_decoder(autoencoder.network)
    objective, optimizer = decoder_objective(autoencoder), torch.optim.Adam(decoder.parameters(), lr=4e-3)
    still = clips(0, size=16)
    losses = []
    for step in range(24):
        loss = objective.loss(decoder, replace(still, ordinals=(step,))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4]), losses


def test_discriminator_starts_at_a_sample_ordinal(autoencoder: Autoencoder) -> None:
    objective = decoder_objective(autoencoder, adversarial_weight=1.0, adversarial_start=5)
    plain = decoder_objective(autoencoder)
    before = {name: value.clone() for name, value in objective.state().items()}
    objective.loss(Painter(0.0), clips(3, 4))
    assert end_step(objective).keys() == {"reconstruction"}
    assert all(before[name].equal(value) for name, value in objective.state().items()), (
        "without weight decay either"
    )

    net, batch = Painter(0.0), clips(4, 5)
    difference_B = objective.loss(net, batch) - plain.loss(net, batch)
    assert difference_B[0] == 0 and difference_B[1] != 0
    assert end_step(objective).keys() == {"reconstruction", "adversarial", "discriminator"}
    changed = [not before[name].equal(objective.state()[name]) for name in before]
    assert any(changed)


def test_discriminator_is_trained_and_gets_no_gradients_of_the_decoder_loss(autoencoder: Autoencoder) -> None:
    objective = decoder_objective(autoencoder, adversarial_weight=1.0)
    terms = []
    for step in range(15):
        net = Painter(0.0)
        loss = objective.loss(net, clips(2 * step, 2 * step + 1)).mean()
        assert objective.discriminator is not None
        gradients = [
            p.grad.clone() for p in objective.discriminator.network.parameters() if p.grad is not None
        ]
        loss.backward()
        after = [p.grad for p in objective.discriminator.network.parameters()]
        assert all(a.equal(b) for a, b in zip(gradients, after, strict=True) if b is not None)
        assert net.colour.grad is not None and net.colour.grad.isfinite()
        terms.append(end_step(objective)["discriminator"])
    assert terms[-1] < 0.8 * terms[0]


def test_discriminator_does_not_depend_on_micro_batches(autoencoder: Autoencoder) -> None:
    together, apart = (decoder_objective(autoencoder, adversarial_weight=1.0) for _ in range(2))
    together.loss(Painter(0.1), clips(0, 1, 2))
    apart.loss(Painter(0.1), clips(0))
    apart.loss(Painter(0.1), clips(1, 2))
    assert end_step(together) == pytest.approx(end_step(apart), rel=1e-5)
    for name, value in together.state().items():
        assert torch.allclose(value, apart.state()[name], rtol=1e-3, atol=1e-6), name


def test_discarded_step_leaves_no_trace(autoencoder: Autoencoder) -> None:
    """The next step is bitwise the same as without it, because the guard computes steps again."""
    once, again = (decoder_objective(autoencoder, adversarial_weight=1.0) for _ in range(2))
    for number in range(2):
        again.loss(Painter(torch.nan), clips(7))
        again.loss(Painter(0.3), clips(8, 9))
        again.discard()
        terms = []
        for objective in (once, again):
            losses = [objective.loss(Painter(0.1), clips(number, ordinal)) for ordinal in (3, 4)]
            terms.append((torch.cat(losses).tolist(), end_step(objective)))
        assert terms[0] == terms[1]
    assert all(value.equal(again.state()[name]) for name, value in once.state().items())
    before = {name: value.clone() for name, value in once.state().items()}
    once.loss(Painter(0.2), clips(5))
    once.discard()
    assert end_step(once) == {}
    assert all(value.equal(before[name]) for name, value in once.state().items()), "no step is taken of it"


def test_resumed_discriminator_is_bitwise_the_same(autoencoder: Autoencoder) -> None:
    def steps(objective: DecoderObjective, numbers: range) -> list[dict[str, float]]:
        terms = []
        for number in numbers:
            objective.loss(Painter(0.1), clips(number))
            terms.append(end_step(objective))
        return terms

    uninterrupted = decoder_objective(autoencoder, adversarial_weight=1.0)
    steps(uninterrupted, range(2))
    state = {name: value.clone() for name, value in uninterrupted.state().items()}
    resumed = decoder_objective(autoencoder, adversarial_weight=1.0)
    resumed.load_state(state)
    assert steps(uninterrupted, range(2, 5)) == steps(resumed, range(2, 5))
    assert all(value.equal(resumed.state()[name]) for name, value in uninterrupted.state().items())


def test_non_finite_batch_does_not_change_the_discriminator(autoencoder: Autoencoder) -> None:
    objective = decoder_objective(autoencoder, adversarial_weight=1.0)
    before = {name: value.clone() for name, value in objective.state().items()}
    objective.loss(Painter(float("nan")), clips(0))
    end_step(objective)
    assert all(value.equal(before[name]) for name, value in objective.state().items())
    objective.loss(Painter(0.1), clips(1))
    end_step(objective)
    assert not all(value.equal(before[name]) for name, value in objective.state().items()), (
        "a finite batch changes it"
    )


def test_previews_are_decoded_from_posterior_means(autoencoder: Autoencoder) -> None:
    decoder, _ = build_decoder(autoencoder.network)
    batch = clips(0, 1)
    with torch.no_grad():
        made = ReconstructionPreview(autoencoder)(decoder, batch, [0, 1])
        latents = posterior(autoencoder.encode(batch.frames_BTCHW.flatten(0, 1) / 127.5 - 1))
        expected = autoencoder.network.decode(latents[2:], num_frames=2).sample
    assert torch.allclose(made[1], expected, atol=1e-5)


def test_psnr() -> None:
    real = torch.full((1, 2, 3, 4, 4), 100, dtype=torch.uint8)
    assert psnr(real + 255 // 100, real) == pytest.approx(20 * torch.log10(torch.tensor(255 / 2)).item())


def test_config_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss\.adversarial_weight is -1"):
        DecoderLossConfig(adversarial_weight=-1)
    with pytest.raises(ValueError, match=r"loss\.perceptual_heads is a, and loss\.perceptual is null"):
        DecoderLossConfig(perceptual_heads="a")
