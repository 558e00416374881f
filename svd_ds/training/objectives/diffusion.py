"""Diffusion objective: the loss of a batch of clips. No other module of training/ depends on diffusion.

    frames -> latents x0            (the frozen autoencoder or its cached moments; the posterior sampled)
    given frames -> Conditioning    (CLIP tokens; noised and encoded frames; scalars; dropout)
    u -> sigma; x = x0 + sigma n    (the training density)
    F(c_in x; c_noise) against v    (the UNet)

Shape legend: B clips, T frames, N images, C latent channels, M = 2C moments of them, H x W pixels,
h x w latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svd_ds.batch import Batch, Conditioning, Draws
from svd_ds.diffusion.denoiser import Network
from svd_ds.diffusion.draws import draw
from svd_ds.diffusion.loss import v_loss
from svd_ds.diffusion.noise import NoiseSchedule
from svd_ds.model.autoencoder import Autoencoder, posterior
from svd_ds.model.conditioner import Conditioner
from svd_ds.scalars import AUGMENTATION
from svd_ds.training.objectives.base import Objective
from svd_ds.video import from_uint8


@dataclass(frozen=True)
class PreparedBatch:
    """A batch ready for the loss at any noise level."""

    x0_BTChw: Tensor
    noise_BTChw: Tensor
    cond: Conditioning
    u_B: Tensor
    """Uniform in (0, 1); `NoiseSchedule.quantile` turns it into sigma."""


@dataclass(frozen=True)
class DiffusionObjective(Objective):
    """Denoising objective in v-space: it has all that the loss needs besides the network and the batch."""

    noise: NoiseSchedule
    offset_noise: float
    autoencoder: Autoencoder
    conditioner: Conditioner
    seed: int

    def draw(self, batch: Batch) -> Batch:
        """Draw the random numbers of each clip, and tokenize its caption if the network gets it."""
        H, W = batch.frames_BTCHW.shape[-2:]
        f = self.autoencoder.downsampling
        given_shape = self.conditioner.noise_shape(self.autoencoder, H, W)
        if self.conditioner.config.concat == "none" and self.offset_noise == 0:
            # Nothing reads this noise, the last of a clip's stream but for offset noise: with that, drawing
            # it is what keeps the offsets' place in the stream.
            given_shape = (0, *given_shape[1:])
        draws = draw(
            self.seed,
            batch.ordinals,
            latent_shape=(batch.num_frames, self.autoencoder.latent_channels, H // f, W // f),
            given_shape=given_shape,
            offset_noise=self.offset_noise,
        )
        tokens_BL = self.conditioner.tokenize(batch.captions) if batch.context_BLD is None else None
        return replace(batch, draws=draws, tokens_BL=tokens_BL)

    def loss(self, net: Network, batch: Batch) -> Tensor:
        """Compute each clip's weighted v-space error, (B,) float32, differentiable in the network's
        parameters."""
        prepared = self.prepare(batch)
        sigma_B = self.noise.quantile(prepared.u_B)
        return self.noise.weight(sigma_B).float() * self.errors(net, prepared, sigma_B).mean(dim=1)

    def errors(self, net: Network, prepared: PreparedBatch, sigma: Tensor) -> Tensor:
        """Compute the squared error of v by clip and frame, (B, T) float32, at noise levels `sigma`, (B,)."""
        return v_loss(net, prepared.x0_BTChw, sigma, prepared.noise_BTChw, prepared.cond)

    @torch.no_grad()
    def prepare(self, batch: Batch) -> PreparedBatch:
        """Compute the latents and the conditioning of a batch."""
        batch, draws = self.with_draws(batch)
        frames_BTCHW = from_uint8(batch.frames_BTCHW)
        return PreparedBatch(
            x0_BTChw=self._latents(batch, frames_BTCHW, draws),
            noise_BTChw=draws.noise_BTChw,
            cond=self._condition(batch, frames_BTCHW, draws),
            u_B=draws.u_B,
        )

    def _latents(self, batch: Batch, frames_BTCHW: Tensor, draws: Draws) -> Tensor:
        moments_BTMhw = batch.moments_BTMhw
        if moments_BTMhw is None:
            moments_BTMhw = self.autoencoder.encode_clips(frames_BTCHW)
        latents_BTChw = posterior(moments_BTMhw.float(), draws.posterior_noise_BTChw)
        return self.autoencoder.scaling_factor * latents_BTChw

    def _condition(self, batch: Batch, frames_BTCHW: Tensor, draws: Draws) -> Conditioning:
        config = self.conditioner.config
        sigma_B = config.augmentation_sigma(draws.augmentation_B).float()
        cond = self.conditioner(
            self.autoencoder,
            first_frame=frames_BTCHW[:, 0],
            last_frame=frames_BTCHW[:, -1],
            captions=batch.captions,
            num_frames=batch.num_frames,
            scalars=batch.scalars_B | {AUGMENTATION.name: sigma_B},
            noise=draws.given_noise_BKCHW,
            context=batch.context_BLD,
            tokens=batch.tokens_BL,
            drop_context=draws.drop("context", config.context_drop_rate),
            drop_concat=draws.drop("concat", config.concat_drop_rate),
            drop_scalars={name: draws.drop(name, rate) for name, rate in config.drop_scalars.items()},
        )
        if batch.still_B is None:
            return cond
        return replace(cond, image_only_BT=batch.still_B[:, None].expand(-1, batch.num_frames))
