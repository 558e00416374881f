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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svd_ds.batch import Batch
from svd_ds.diffusion.draws import draw
from svd_ds.model.autoencoder import Autoencoder, posterior
from svd_ds.model.perceptual import Perceptual
from svd_ds.parallel.collectives import all_reduce_sum
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
        self._sums: dict[str, Tensor] = {}
        """Term -> sum over this rank's clips, a float64 scalar on the device."""
        self._clips: dict[str, int] = {}

    def draw(self, batch: Batch) -> Batch:
        """Draw the noise of each clip's posterior."""
        T, _, H, W = batch.frames_BTCHW.shape[1:]
        f = self.autoencoder.downsampling
        latent_shape = (T, self.autoencoder.latent_channels, H // f, W // f)
        # The decoder has no conditioning frames that would get noise: K = 0.
        return replace(batch, draws=draw(self.seed, batch.ordinals, latent_shape, (0, 3, H, W)))

    def loss(self, net: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Return the weighted loss of each clip, (B,) float32, differentiable in the network's parameters.

        It also accumulates the gradients of the discriminator, if there is one.
        """
        batch, draws = self.with_draws(batch)
        frames_BTCHW = from_uint8(batch.frames_BTCHW)
        with torch.no_grad():
            moments_BTMhw = self.autoencoder.encode_clips(frames_BTCHW)
            # Without the scaling factor.
            latents_BTChw = posterior(moments_BTMhw, draws.posterior_noise_BTChw)
        decoded_BTCHW = net(latents_BTChw).float()
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

    def reduce_terms(self) -> dict[str, Tensor]:
        """Sum each term and its clips over all ranks, and reduce the gradients of the discriminator."""
        device = next(self.autoencoder.network.parameters()).device
        sums = {name: self._sums.get(name, _scalar(0.0, device)) for name in self._term_names()}
        clips = {name: _scalar(self._clips.get(name, 0), device) for name in sums}
        all_reduce_sum([*sums.values(), *clips.values()])
        terms = sums | {f"{name}_clips": count for name, count in clips.items()}
        if self.discriminator is not None:
            terms["discriminator_is_finite"] = self.discriminator.reduce_gradients()
        return terms

    def end_step(self, terms: Mapping[str, float]) -> dict[str, float]:
        """Take the discriminator's optimiser step, and return the mean of each term over the step's clips."""
        if self.discriminator is not None:
            self.discriminator.step(is_finite=terms["discriminator_is_finite"] > 0)
        self._clear()
        clips = {name: terms[f"{name}_clips"] for name in self._term_names()}
        # Before loss.adversarial_start the adversarial terms have no clips.
        return {name: terms[name] / count for name, count in clips.items() if count > 0}

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
        total = values_B.detach().sum().double()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._clips[name] = self._clips.get(name, 0) + len(values_B)

    def _adversarial_term(
        self,
        discriminator: DiscriminatorTrainer,
        ordinals: Sequence[int],
        frames_BTCHW: Tensor,
        decoded_BTCHW: Tensor,
    ) -> Tensor:
        """Return the adversarial term, (B,), which is 0 for clips before loss.adversarial_start."""
        # Sample ordinals make the start independent of the number of ranks and micro-batches.
        rows = [row for row, ordinal in enumerate(ordinals) if ordinal >= self.config.adversarial_start]
        zero = frames_BTCHW.new_zeros(())
        if not rows:
            return zero.expand(len(ordinals))
        real, generated = _select(frames_BTCHW, rows), _select(decoded_BTCHW, rows)
        loss_B = discriminator.accumulate_discriminator_grads(real, generated)
        self._add_term("discriminator", loss_B)
        loss_B = discriminator.generator_loss(generated)
        self._add_term("adversarial", loss_B)
        found = dict(zip(rows, loss_B.unbind(), strict=True))
        return torch.stack([found.get(row, zero) for row in range(len(ordinals))])


def _select(x: Tensor, rows: Sequence[int]) -> Tensor:
    # Not x[rows]: a list of indices is copied to the device, and waited for.
    parts = x.unbind()
    return x if len(rows) == len(parts) else torch.stack([parts[row] for row in rows])


def _scalar(value: float, device: torch.device) -> Tensor:
    # Filled on the device: a copy from host memory is waited for.
    return torch.full((), value, dtype=torch.float64, device=device)


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
