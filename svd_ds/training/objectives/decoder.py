"""Objective of the autoencoder's decoder: reconstruction of the encoded frames.

    frames -> latents               (the frozen encoder; a sample of its posterior)
    latents -> frames               (the network)
    loss = |difference| + perceptual distance + adversarial loss

The SVD paper gives no recipe for its decoder. This is VideoLDM's (arXiv 2304.08818 section 3.1.1): only the
decoder is trained, on video, with a discriminator over space and time and no image discriminator. The
pixel term is L1, as in the losses of Stable Diffusion's autoencoders (CompVis/latent-diffusion
contperceptual.py): L2 rewards blur, the mean of all plausible images.

Shape legend: B clips, T frames, C latent channels, H x W pixels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svd_ds.batch import Batch
from svd_ds.diffusion.draws import draw
from svd_ds.model.autoencoder import Autoencoder, posterior
from svd_ds.model.perceptual import Perceptual
from svd_ds.parallel.collectives import all_reduce_mean
from svd_ds.settings import Settings, location, number
from svd_ds.training.objectives.base import Objective
from svd_ds.training.objectives.discriminator import DiscriminatorTrainer
from svd_ds.video import from_uint8


@dataclass(frozen=True)
class DecoderLossConfig(Settings, section="loss"):
    """Loss of the decoder (task=decoder). Weights of terms are relative to the mean absolute difference of
    pixels in [-1, 1]."""

    perceptual: str | None = location(None)
    """File with the weights of torchvision's VGG16 (safetensors); null: no perceptual term."""
    perceptual_heads: str | None = location(None)
    """File with the linear heads of LPIPS for VGG16 (safetensors); null weights all channels equally."""
    perceptual_weight: float = number(1.0, ge=0, le=1e6)
    """Weight of the perceptual term, which is computed only if loss.perceptual is set."""
    adversarial_weight: float = number(0.0, ge=0, le=1e6)
    """Weight of the adversarial term; 0: no discriminator is trained."""
    adversarial_start: int = number(0, ge=0)
    """Number of clips of the run after which the discriminator and the adversarial term begin."""
    discriminator_width: int = number(64, ge=1, le=4096)
    """Channels of the first level of the discriminator."""
    discriminator_lr: float = number(1e-4, gt=0, le=100)
    """Learning rate of the discriminator, constant over the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perceptual_heads is not None and self.perceptual is None:
            raise ValueError(f"loss.perceptual_heads is {self.perceptual_heads}, and loss.perceptual is null")


class DecoderObjective(Objective):
    """Objective of the decoder, with the terms of its loss and its discriminator."""

    def __init__(
        self,
        config: DecoderLossConfig,
        autoencoder: Autoencoder,
        perceptual: Perceptual | None,
        discriminator: DiscriminatorTrainer | None,
        seed: int,
    ) -> None:
        self.config = config
        self.autoencoder = autoencoder
        self.perceptual = perceptual
        self.discriminator = discriminator
        self.seed = seed
        self._sums: dict[str, float] = {}
        self._clips: dict[str, int] = {}

    def loss(self, net: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Return the weighted loss of each clip, (B,) float32, differentiable in the network's parameters.

        It also accumulates the gradients of the discriminator, if there is one.
        """
        frames_BTCHW = from_uint8(batch.frames_BTCHW)
        decoded_BTCHW = net(self._latents(batch.ordinals, frames_BTCHW)).float()
        loss_B = (decoded_BTCHW - frames_BTCHW).abs().mean(dim=(1, 2, 3, 4))
        self._add_term("reconstruction", loss_B)
        if self.perceptual is not None:
            distance_N = self.perceptual(decoded_BTCHW.flatten(0, 1), frames_BTCHW.flatten(0, 1))
            distance_B = distance_N.unflatten(0, decoded_BTCHW.shape[:2]).mean(dim=1)
            self._add_term("perceptual", distance_B)
            loss_B = loss_B + self.config.perceptual_weight * distance_B
        if self.discriminator is not None:
            loss_B = loss_B + self.config.adversarial_weight * self._adversarial_term(
                self.discriminator, batch.ordinals, frames_BTCHW, decoded_BTCHW
            )
        return loss_B

    def end_step(self) -> dict[str, float]:
        """Take the discriminator's optimiser step, and return the mean of each term over the step's clips."""
        if self.discriminator is not None:
            self.discriminator.step()
        names = self._term_names()
        sums = all_reduce_mean([self._sums.get(name, 0.0) for name in names])
        clips = all_reduce_mean([float(self._clips.get(name, 0)) for name in names])
        self._clear()
        # Before loss.adversarial_start the adversarial terms have no clips.
        return {name: a / b for name, a, b in zip(names, sums, clips, strict=True) if b > 0}

    def discard(self) -> None:
        if self.discriminator is not None:
            self.discriminator.discard_gradients()
        self._clear()

    def state(self) -> dict[str, Tensor]:
        return self.discriminator.state() if self.discriminator is not None else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        assert self.discriminator is not None, "only a discriminator has state"
        self.discriminator.load_state(state)

    def _term_names(self) -> list[str]:
        """Return the names of all terms that may occur, the same on every rank."""
        names = ["reconstruction"]
        if self.perceptual is not None:
            names.append("perceptual")
        if self.discriminator is not None:
            names += ["adversarial", "discriminator"]
        return names

    def _clear(self) -> None:
        self._sums.clear()
        self._clips.clear()

    def _add_term(self, name: str, values_B: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + values_B.detach().sum().item()
        self._clips[name] = self._clips.get(name, 0) + len(values_B)

    def _adversarial_term(
        self,
        discriminator: DiscriminatorTrainer,
        ordinals: Sequence[int],
        frames_BTCHW: Tensor,
        decoded_BTCHW: Tensor,
    ) -> Tensor:
        """Return the adversarial term, (B,), which is 0 for clips before loss.adversarial_start."""
        term_B = frames_BTCHW.new_zeros(len(ordinals))
        # Sample ordinals make the start independent of the number of ranks and micro-batches.
        rows = [row for row, ordinal in enumerate(ordinals) if ordinal >= self.config.adversarial_start]
        if rows:
            self._add_term(
                "discriminator",
                discriminator.accumulate_discriminator_grads(frames_BTCHW[rows], decoded_BTCHW[rows]),
            )
            loss_B = discriminator.generator_loss(decoded_BTCHW[rows])
            self._add_term("adversarial", loss_B)
            term_B = term_B.index_put((torch.tensor(rows, device=term_B.device),), loss_B)
        return term_B

    @torch.no_grad()
    def _latents(self, ordinals: Sequence[int], frames_BTCHW: Tensor) -> Tensor:
        """Sample the encoder's posterior: latents without the scaling factor, (B, T, C, h, w)."""
        H, W = frames_BTCHW.shape[-2:]
        f = self.autoencoder.downsampling
        moments_BTMhw = self.autoencoder.encode_clips(frames_BTCHW)
        latent_shape = (frames_BTCHW.shape[1], self.autoencoder.latent_channels, H // f, W // f)
        # The decoder has no conditioning frames that would get noise: K = 0.
        draws = draw(self.seed, ordinals, latent_shape, (0, 3, H, W), frames_BTCHW.device)
        return posterior(moments_BTMhw, draws.posterior_noise_BTChw)


@dataclass(frozen=True)
class ReconstructionPreview:
    """PreviewFn that reconstructs clips from their own latents, the means of the posterior."""

    autoencoder: Autoencoder

    def __call__(self, net: Callable[..., Tensor], clips: Batch, ordinals: Sequence[int]) -> Tensor:
        frames_BTCHW = from_uint8(clips.frames_BTCHW)
        latents_BTChw = posterior(self.autoencoder.encode_clips(frames_BTCHW))
        return torch.cat([net(latents_TChw[None]).float() for latents_TChw in latents_BTChw])


def psnr(generated: Tensor, real: Tensor) -> float:
    """Return the peak signal-to-noise ratio of uint8 images in dB, over all pixels; infinite if they are
    equal."""
    squared = (generated.float() - real.float()).square().mean().double()
    return float(10 * torch.log10(255**2 / squared))
