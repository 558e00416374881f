"""From a batch of clips to the decoder's loss: how far its frames are from those that were encoded.

    frames -> latents               (the frozen encoder; its posterior sampled)
    latents -> frames               (the network)
    |difference| + perceptual distance + what the discriminator thinks

The SVD paper gives no recipe for its decoder. VideoLDM's (arXiv 2304.08818 section 3.1.1): the decoder alone,
on video, with a discriminator over space and time and none for single images. The pixel term is L1, as in the
losses of Stable Diffusion's autoencoders (CompVis/latent-diffusion contperceptual.py): L2 rewards blur, the
mean of all that may be there.

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
    """Weights of terms are relative to the mean absolute difference of pixels in [-1, 1]."""

    perceptual: str | None = location(None)
    """File of a torchvision VGG16's weights (safetensors); null: no perceptual term."""
    perceptual_heads: str | None = location(None)
    """File of LPIPS' linear heads for it (safetensors); null: every channel counts one."""
    perceptual_weight: float = number(1.0, ge=0, le=1e6)
    adversarial_weight: float = number(0.0, ge=0, le=1e6)
    """0: no discriminator."""
    adversarial_start: int = number(0, ge=0)
    """Clips seen before there is a discriminator: it and its term begin there."""
    discriminator_width: int = number(64, ge=1, le=4096)
    """Channels of its first level."""
    discriminator_lr: float = number(1e-4, gt=0, le=100)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perceptual_heads is not None and self.perceptual is None:
            raise ValueError(f"loss.perceptual_heads is {self.perceptual_heads}, and loss.perceptual is null")


class DecoderObjective(Objective):
    """The decoder's objective: everything that its loss needs besides the network and the batch."""

    def __init__(
        self,
        config: DecoderLossConfig,
        autoencoder: Autoencoder,
        perceptual: Perceptual | None,
        adversary: DiscriminatorTrainer | None,
        seed: int,
    ) -> None:
        self.config = config
        self.autoencoder = autoencoder
        self.perceptual = perceptual
        self.adversary = adversary
        self.seed = seed
        self._sums: dict[str, float] = {}
        self._clips: dict[str, int] = {}

    def loss(self, net: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Weighted error of each clip, (B,) float32; differentiable in the network's parameters.

        With a discriminator: adds the micro-batch to its gradients, too.
        """
        frames_BTCHW = from_uint8(batch.frames_BTCHW)
        made_BTCHW = net(self._latents(batch.ordinals, frames_BTCHW)).float()
        loss_B = (made_BTCHW - frames_BTCHW).abs().mean(dim=(1, 2, 3, 4))
        self._note("reconstruction", loss_B)
        if self.perceptual is not None:
            distance_N = self.perceptual(made_BTCHW.flatten(0, 1), frames_BTCHW.flatten(0, 1))
            distance_B = distance_N.unflatten(0, made_BTCHW.shape[:2]).mean(dim=1)
            self._note("perceptual", distance_B)
            loss_B = loss_B + self.config.perceptual_weight * distance_B
        if self.adversary is not None:
            loss_B = loss_B + self.config.adversarial_weight * self._adversarial(
                self.adversary, batch.ordinals, frames_BTCHW, made_BTCHW
            )
        return loss_B

    def end_step(self) -> dict[str, float]:
        """Let the discriminator take its step; the mean of each term over the step's clips."""
        if self.adversary is not None:
            self.adversary.step()
        names = self._names()
        sums = all_reduce_mean([self._sums.get(name, 0.0) for name in names])
        clips = all_reduce_mean([float(self._clips.get(name, 0)) for name in names])
        self._clear()
        # The discriminator's terms are not there before it begins.
        return {name: a / b for name, a, b in zip(names, sums, clips, strict=True) if b > 0}

    def discard(self) -> None:
        if self.adversary is not None:
            self.adversary.discard_gradients()
        self._clear()

    def state(self) -> dict[str, Tensor]:
        return self.adversary.state() if self.adversary is not None else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        assert self.adversary is not None, "only a discriminator leaves a state"
        self.adversary.load_state(state)

    def _names(self) -> list[str]:
        """Of every term there may be: each rank has the same."""
        names = ["reconstruction"]
        if self.perceptual is not None:
            names.append("perceptual")
        if self.adversary is not None:
            names += ["adversarial", "discriminator"]
        return names

    def _clear(self) -> None:
        self._sums.clear()
        self._clips.clear()

    def _note(self, name: str, values_B: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + values_B.detach().sum().item()
        self._clips[name] = self._clips.get(name, 0) + len(values_B)

    def _adversarial(
        self,
        adversary: DiscriminatorTrainer,
        ordinals: Sequence[int],
        frames_BTCHW: Tensor,
        made_BTCHW: Tensor,
    ) -> Tensor:
        """The discriminator's term, (B,): 0 for clips that come before it begins."""
        term_B = frames_BTCHW.new_zeros(len(ordinals))
        # By a clip's place in the order: whatever the ranks and micro-batches, it begins at the same clip.
        begun = [row for row, ordinal in enumerate(ordinals) if ordinal >= self.config.adversarial_start]
        if begun:
            self._note(
                "discriminator",
                adversary.accumulate_discriminator_grads(frames_BTCHW[begun], made_BTCHW[begun]),
            )
            judged = adversary.generator_loss(made_BTCHW[begun])
            self._note("adversarial", judged)
            term_B = term_B.index_put((torch.tensor(begun, device=term_B.device),), judged)
        return term_B

    @torch.no_grad()
    def _latents(self, ordinals: Sequence[int], frames_BTCHW: Tensor) -> Tensor:
        """A draw from the encoder's posterior, not scaled, (B, T, C, h, w)."""
        H, W = frames_BTCHW.shape[-2:]
        f = self.autoencoder.downsampling
        moments_BTMhw = self.autoencoder.encode_clips(frames_BTCHW)
        latent_shape = (frames_BTCHW.shape[1], self.autoencoder.latent_channels, H // f, W // f)
        # No frame is given to the decoder besides the latents: no noise for any.
        draws = draw(self.seed, ordinals, latent_shape, (0, 3, H, W), frames_BTCHW.device)
        return posterior(moments_BTMhw, draws.posterior_noise_BTChw)


@dataclass(frozen=True)
class ReconstructionPreview:
    """Renders a clip anew from its own latents, the posterior's means."""

    autoencoder: Autoencoder

    def __call__(self, net: Callable[..., Tensor], clips: Batch, ordinals: Sequence[int]) -> Tensor:
        frames_BTCHW = from_uint8(clips.frames_BTCHW)
        latents_BTChw = posterior(self.autoencoder.encode_clips(frames_BTCHW))
        return torch.cat([net(latents_TChw[None]).float() for latents_TChw in latents_BTChw])


def psnr(made: Tensor, real: Tensor) -> float:
    """Peak signal to noise of uint8 pictures, in dB, over all their pixels; infinite where they are equal."""
    squared = (made.float() - real.float()).square().mean().double()
    return float(10 * torch.log10(255**2 / squared))
