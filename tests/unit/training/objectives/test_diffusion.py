"""The diffusion objective: inputs of the network, drops, and a loss that falls."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from svd_ds.batch import Batch, Clip
from svd_ds.diffusion.draws import draw
from svd_ds.diffusion.noise import NoiseConfig, build_noise_schedule
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.conditioner import Conditioner, ConditionerConfig
from svd_ds.model.unet import UNet
from svd_ds.sample import TINY
from svd_ds.training.objectives.diffusion import DiffusionObjective
from tests.networks import SMALL
from tests.videos import moving_square


def clip(
    ordinal: int,
    num_frames: int = 4,
    fps: float = 6.0,
    motion_bucket: float = 100.0,
    elevation: float = math.nan,
) -> Clip:
    scalars = {"fps": fps, "motion_bucket": motion_bucket, "elevation": elevation}
    frames = torch.from_numpy(moving_square(num_frames, height=64, width=64, seed=ordinal)).permute(
        0, 3, 1, 2
    )
    return Clip(f"s{ordinal}", ordinal, frames.contiguous(), "a square moves", scalars)


@pytest.fixture(scope="module")
def diffusion() -> DiffusionObjective:
    config = ConditionerConfig(drop_context=0.0, drop_concat=0.0)
    return DiffusionObjective(
        noise=build_noise_schedule(NoiseConfig(P_mean=1.0, P_std=1.6), 64, 64),
        offset_noise=0.0,
        autoencoder=Autoencoder.load(TINY),
        conditioner=Conditioner.load(config, TINY),
        seed=0,
    )


class Recorder:
    """A network that records its inputs and returns zeros."""

    def __call__(
        self, x: Tensor, c_noise: Tensor, context: Tensor, scalars: Tensor, image_only: Tensor | None
    ) -> Tensor:
        self.x, self.c_noise, self.context, self.scalars = x, c_noise, context, scalars
        self.image_only = image_only
        return torch.zeros_like(x[:, :, :4])


def test_network_inputs_follow_the_paper(diffusion: DiffusionObjective) -> None:
    net = Recorder()
    loss_B = diffusion.loss(net, Batch.from_clips([clip(3, fps=8.0, motion_bucket=40.0), clip(9)]))
    assert loss_B.shape == (2,)
    assert net.x.shape == (2, 4, 8, 8, 8), "4 noisy latent channels and 4 of the conditioning frame"
    assert net.context.shape == (2, 1, 64)
    assert net.scalars[0, :2].tolist() == [7.0, 40.0], "fps - 1, motion bucket"
    assert 0.003 < net.scalars[0, 2] < 0.6, "the augmentation's sigma, ln of it N(-3, 0.5^2)"
    concat = net.x[:, :, 4:]
    assert torch.equal(concat[:, 0], concat[:, 3]), "one frame on all frames"
    assert not torch.equal(concat[0], concat[1])
    latents = diffusion.autoencoder.encode(clip(3).frames_TCHW[:1].float() / 127.5 - 1)[:, :4]
    error = (concat[0, :1] - latents).norm() / latents.norm()
    assert error < 0.5, "the posterior mean of the first frame, but for its noise, and not scaled"


def test_both_ends_and_the_elevation_reach_the_network(diffusion: DiffusionObjective) -> None:
    config = ConditionerConfig(
        context="ends",
        concat="ends",
        scalars=("fps", "motion_bucket", "augmentation", "elevation"),
        drop_context=0.0,
        drop_concat=0.0,
    )
    net, conditioner = Recorder(), Conditioner(config, diffusion.conditioner.encoder)
    clips = [clip(3, elevation=12.5), clip(9)]
    replace(diffusion, conditioner=conditioner).loss(net, Batch.from_clips(clips))
    assert net.x.shape == (2, 4, 9, 8, 8) and net.context.shape == (2, 2, 64)
    assert net.scalars[0, 3] == 12.5 and net.scalars[1, 3].isnan()
    assert net.x[0, :, 8, 0, 0].tolist() == [1, 0, 0, 1]
    for place in (0, -1):
        frame = clip(3).frames_TCHW[place][None].float() / 127.5 - 1
        latents = diffusion.autoencoder.encode(frame)[:, :4]
        assert (net.x[0, place, 4:8] - latents).norm() < 0.5 * latents.norm()


def test_captions_reach_the_network_and_are_dropped_a_clip_at_a_time(diffusion: DiffusionObjective) -> None:
    text = ConditionerConfig(context="text", concat="none", scalars=("fps", "motion_bucket"), drop_text=0.5)
    conditioner, net = Conditioner.load(text, TINY), Recorder()
    replace(diffusion, conditioner=conditioner).loss(
        net, Batch.from_clips([clip(i, fps=8.0) for i in range(16)])
    )
    assert net.x.shape == (16, 4, 4, 8, 8), "nothing is joined to the noisy latents"
    assert net.scalars[0].tolist() == [7.0, 100.0], "fps - 1, motion bucket"
    assert net.context.shape == (16, 77, 64)
    dropped = (net.context == 0).all(dim=(1, 2))
    assert 2 < dropped.sum() < 14
    states = conditioner.encoder(["a square moves"])  # type: ignore[operator]
    assert all(torch.allclose(states[0], kept, atol=1e-5) for kept in net.context[~dropped])


@pytest.mark.parametrize("offset_noise", [0.0, 0.5])
def test_noise_of_frames_that_nothing_reads_is_drawn_only_before_offset_noise(
    diffusion: DiffusionObjective, offset_noise: float
) -> None:
    """Offset noise comes after it in a clip's stream, and must not change."""
    text = ConditionerConfig(context="none", concat="none", scalars=(), context_width=8)
    objective = replace(diffusion, conditioner=Conditioner(text), offset_noise=offset_noise)
    found = objective.draw(Batch.from_clips([clip(3)])).draws
    expected = draw(0, [3], (4, 4, 8, 8), (1, 3, 64, 64), offset_noise)
    assert found is not None
    assert found.given_noise_BKCHW.numel() == (0 if offset_noise == 0 else 3 * 64 * 64)
    for name in ("u_B", "augmentation_B", "drop_BN", "noise_BTChw", "posterior_noise_BTChw"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_draws_made_ahead_give_the_same_loss(diffusion: DiffusionObjective) -> None:
    net, batch = Recorder(), Batch.from_clips([clip(3), clip(9)])
    assert torch.equal(diffusion.loss(net, diffusion.draw(batch)), diffusion.loss(net, batch))
    text = ConditionerConfig(context="text", concat="none", scalars=("fps", "motion_bucket"))
    captions = replace(diffusion, conditioner=Conditioner.load(text, TINY))
    drawn = captions.draw(batch)
    assert drawn.tokens_BL is not None and drawn.tokens_BL.shape == (2, 77)
    captions.loss(net, drawn)
    context = net.context
    captions.loss(net, batch)
    assert torch.equal(context, net.context)


def test_sigma_depends_on_the_clip_and_not_on_its_batch(diffusion: DiffusionObjective) -> None:
    net = Recorder()
    together = diffusion.loss(net, Batch.from_clips([clip(3), clip(9)]))
    noise_levels = net.c_noise
    alone = torch.cat([diffusion.loss(net, Batch.from_clips([clip(ordinal)])) for ordinal in (3, 9)])
    assert torch.allclose(together, alone, rtol=1e-5)
    assert noise_levels[0] != noise_levels[1]
    u = 0.5 * (1 + math.erf((4 * net.c_noise.item() - 1.0) / (1.6 * math.sqrt(2))))
    assert u == pytest.approx(draw(0, [9], (1, 1, 1, 1), (1, 1, 1, 1)).u_B.item(), abs=1e-4)


def test_cached_moments_give_the_same_loss_as_frames(diffusion: DiffusionObjective) -> None:
    batch = Batch.from_clips([clip(3), clip(9)])
    moments_NMhw = diffusion.autoencoder.encode(batch.frames_BTCHW.flatten(0, 1).float() / 127.5 - 1)
    first = replace(batch, frames_BTCHW=batch.frames_BTCHW[:, :1])
    cached = replace(first, moments_BTMhw=moments_NMhw.unflatten(0, (2, 4)))
    net = Recorder()
    expected, seen = diffusion.loss(net, batch), net.x
    assert torch.allclose(diffusion.loss(net, cached), expected, rtol=1e-5)
    assert torch.allclose(net.x, seen, rtol=1e-4, atol=1e-5)


def test_signals_are_dropped_a_clip_at_a_time(diffusion: DiffusionObjective) -> None:
    dropping = ConditionerConfig(drop_context=0.5, drop_concat=0.5, drop_scalars={"fps": 0.5})
    conditioner = Conditioner(dropping, diffusion.conditioner.encoder)
    net = Recorder()
    replace(diffusion, conditioner=conditioner).loss(net, Batch.from_clips([clip(i) for i in range(16)]))
    context_dropped = (net.context == 0).all(dim=(1, 2)).tolist()
    concat_dropped = (net.x[:, :, 4:] == 0).flatten(1).all(dim=1).tolist()
    assert 2 < sum(context_dropped) < 14
    assert 2 < sum(concat_dropped) < 14
    scalars_dropped = net.scalars.isnan()
    assert 2 < scalars_dropped[:, 0].sum() < 14 and not scalars_dropped[:, 1:].any(), "fps alone"
    together = (context_dropped, concat_dropped, scalars_dropped[:, 0].tolist())
    assert len({tuple(signal) for signal in together}) == 3, "independently of each other"


@pytest.mark.slow
def test_one_clip_can_be_overfitted(diffusion: DiffusionObjective) -> None:
    """The proof that signal and gradient reach every part: the loss falls by more than ten."""
    unet = UNet(replace(SMALL, attention_levels=(True, True), context_width=64))
    num_steps, batch_size = 300, 4
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, num_steps, pct_start=0.1)
    still = clip(0, num_frames=2)
    losses = []
    for step in range(num_steps):
        # The same clip, with a sigma and noise of its own at each sample ordinal.
        batch = Batch.from_clips([replace(still, ordinal=step * batch_size + i) for i in range(batch_size)])
        loss = diffusion.loss(unet, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    first, last = sum(losses[:10]) / 10, sum(losses[-30:]) / 30
    assert last < first / 10, f"the loss fell from {first:.3f} to {last:.3f}"


def test_still_images_take_the_image_path(diffusion: DiffusionObjective) -> None:
    net = Recorder()
    diffusion.loss(net, Batch.from_clips([clip(3), clip(9)]))
    assert net.image_only is None
    diffusion.loss(net, Batch.from_clips([clip(3), replace(clip(9), still=True)]))
    assert net.image_only is not None
    assert net.image_only.tolist() == [[False] * 4, [True] * 4]
