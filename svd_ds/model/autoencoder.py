"""The frozen autoencoder: frames to latents and back, a few frames at a time.

It is diffusers' AutoencoderKLTemporalDecoder: the image encoder of Stable Diffusion 2.1 (f8, 4 channels) and
a decoder with temporal layers (sgm temporal_ae.py; VideoLDM, arXiv 2304.08818 section 3.1.1). Or it is Stable
Diffusion's own AutoencoderKL, whose decoder takes one frame at a time.

    frames --encode--> moments --posterior--> latents --x scaling_factor--> diffusion --decode--> frames

Shape legend: B clips, T frames, N images, C latent channels, H x W pixels, h x w latent pixels (H/8 x W/8).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svd_ds.model.frozen import class_name, load_frozen

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder

TEMPORAL_CLASS, IMAGE_CLASS = "AutoencoderKLTemporalDecoder", "AutoencoderKL"


class Autoencoder:
    """A frozen autoencoder. Its methods build no autograd graph and return float32 for any compute dtype."""

    def __init__(self, network: AutoencoderKLTemporalDecoder | AutoencoderKL, chunk: int = 14) -> None:
        """Wrap diffusers' network.

        Args:
            network: the autoencoder.
            chunk: number of frames that are encoded or decoded at a time. The public SVD decodes 14 together.

        Raises:
            ValueError: `chunk` is below 1.
        """
        if chunk < 1:
            raise ValueError(f"the autoencoder's chunk is {chunk}: it must be at least 1 frame")
        self.network: Any = network  # diffusers hides its attributes from type checkers
        self.chunk = chunk
        self.is_temporal = type(network).__name__ == TEMPORAL_CLASS

    @staticmethod
    def load(
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        chunk: int = 14,
    ) -> Autoencoder:
        """Load the vae/ of the pipeline of a video or image model.

        The public weights overflow in float16, as their config states (`force_upcast`): they stay in float32.

        Args:
            path: a pipeline folder, or a hub id like "organisation/name".
            device: device of the weights.
            dtype: dtype of the weights.
            chunk: see the constructor.

        Raises:
            FileNotFoundError: the folder lacks vae/ or its weights.
            ValueError: the autoencoder is of another class.
        """
        import diffusers  # takes seconds, so only when it is needed

        name = class_name(path, "vae")
        if name not in (TEMPORAL_CLASS, IMAGE_CLASS):
            raise ValueError(
                f"the vae/ of {path} is {name}: it must be one of {TEMPORAL_CLASS}, {IMAGE_CLASS}"
            )
        network = load_frozen(getattr(diffusers, name), path, "vae", device, dtype)
        if dtype == torch.float16 and network.config.force_upcast:
            network = load_frozen(getattr(diffusers, name), path, "vae", device, torch.float32)
        return Autoencoder(network, chunk)

    @property
    def scaling_factor(self) -> float:
        """Factor of latents before diffusion, 1 / their standard deviation."""
        return float(self.network.config.scaling_factor)

    @property
    def latent_channels(self) -> int:
        return int(self.network.config.latent_channels)

    @property
    def downsampling(self) -> int:
        """Side of a latent pixel, in pixels."""
        return int(2 ** (len(self.network.config.block_out_channels) - 1))

    def fingerprint(self) -> str:
        """Hash the encoder to 12 hexadecimal digits; latents depend on no other part.

        The hash is over names, shapes and values of the parameters, the values in bfloat16: it is the same
        whether the weights were loaded in float32 or bfloat16.
        """
        digest = hashlib.sha256()
        for part in ("encoder", "quant_conv"):
            for name, value in sorted(getattr(self.network, part).state_dict().items()):
                digest.update(f"{part}.{name} {tuple(value.shape)}\n".encode())
                digest.update(value.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
        return digest.hexdigest()[:12]

    def check_size(self, height: int, width: int) -> None:
        """Check the size of frames, in pixels.

        Raises:
            ValueError: a side is not a multiple of the downsampling.
        """
        if height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"frames are {height}x{width}, but the autoencoder needs sides that are multiples of "
                f"{self.downsampling}"
            )

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames to the moments of the posterior.

        Args:
            frames: in [-1, 1], (N, 3, H, W).

        Returns:
            Means, then log-variances, not multiplied by the scaling factor: (N, 2C, h, w), float32.

        Raises:
            ValueError: a side is not a multiple of the downsampling.
        """
        self.check_size(*frames.shape[-2:])
        weight = self.network.quant_conv.weight
        moments = [
            self.network.quant_conv(self.network.encoder(chunk.to(weight.device, weight.dtype))).float()
            for chunk in frames.split(self.chunk)
        ]
        return torch.cat(moments)

    def encode_clips(self, frames: Tensor) -> Tensor:
        """Encode clips: (B, T, 3, H, W) to moments, (B, T, 2C, h, w); see `encode`."""
        return self.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode clips.

        A temporal decoder mixes the frames of a call, so it is called with up to `chunk` frames of one clip.

        Args:
            latents: multiplied by the scaling factor, as those of the UNet, (B, T, C, h, w).

        Returns:
            Frames in [-1, 1], (B, T, 3, H, W), float32.
        """
        weight = self.network.quant_conv.weight
        clips = []
        for latents_TChw in latents / self.scaling_factor:
            frames = []
            for chunk in latents_TChw.split(self.chunk):
                options = {"num_frames": len(chunk)} if self.is_temporal else {}
                frames.append(self.network.decode(chunk.to(weight), **options).sample.float())
            clips.append(torch.cat(frames))
        return torch.stack(clips).clamp(-1, 1)


def posterior(moments: Tensor, noise: Tensor | None = None) -> Tensor:
    """Sample the encoder's Gaussian, or return its mean.

    Log-variances are clamped to [-30, 20], as in the public code (sgm distributions.py).

    Args:
        moments: means, then log-variances, (..., 2C, h, w).
        noise: standard normal, (..., C, h, w); None for the mean.

    Returns:
        Latents, not multiplied by the scaling factor, (..., C, h, w).
    """
    mean, log_variance = moments.chunk(2, dim=-3)
    if noise is None:
        return mean
    return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
