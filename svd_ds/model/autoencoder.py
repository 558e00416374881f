"""The frozen autoencoder: frames <-> latents, a few frames at a time.

It is diffusers' AutoencoderKLTemporalDecoder: the image encoder of Stable Diffusion 2.1 (f8, 4 channels) and
a decoder that also mixes over time (sgm temporal_ae.py). Or it is Stable Diffusion's own, AutoencoderKL,
whose decoder takes one frame at a time.

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

KINDS = ("AutoencoderKLTemporalDecoder", "AutoencoderKL")


class Autoencoder:
    """Frozen: no method keeps a graph. Results are float32, whatever the network computes in."""

    def __init__(self, network: AutoencoderKLTemporalDecoder | AutoencoderKL, chunk: int = 14) -> None:
        """`chunk`: frames encoded, or decoded together, at a time. The public SVD decodes 14 together."""
        if chunk < 1:
            raise ValueError(f"the autoencoder's chunk is {chunk}, but must be at least 1 frame")
        self.network: Any = network  # diffusers hides its attributes from type checkers
        self.chunk = chunk
        self.mixes_time = type(network).__name__ == KINDS[0]

    @staticmethod
    def load(
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        chunk: int = 14,
    ) -> Autoencoder:
        """Read `vae/` of a pipeline folder, or of a hub id like "organisation/name", video or image.

        The public weights overflow in float16 and say so (`force_upcast`): those are kept in float32.
        Raises FileNotFoundError where the folder lacks the part or its weights, ValueError for another class.
        """
        import diffusers  # takes seconds: not before it is needed

        name = class_name(path, "vae")
        if name not in KINDS:
            raise ValueError(f"the vae/ of {path} is {name}, and must be {' or '.join(KINDS)}")
        network = load_frozen(getattr(diffusers, name), path, "vae", device, dtype)
        if dtype == torch.float16 and network.config.force_upcast:
            network = load_frozen(getattr(diffusers, name), path, "vae", device, torch.float32)
        return Autoencoder(network, chunk)

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied by before diffusion: 1 / their standard deviation."""
        return float(self.network.config.scaling_factor)

    @property
    def latent_channels(self) -> int:
        return int(self.network.config.latent_channels)

    @property
    def downsampling(self) -> int:
        """Pixels a latent pixel, along each side."""
        return int(2 ** (len(self.network.config.block_out_channels) - 1))

    def fingerprint(self) -> str:
        """12 hexadecimal digits that name what makes the moments: the encoder.

        A hash of its parameters' names, shapes and values, the values in bfloat16: the same whether they were
        loaded in float32 or bfloat16. Moments depend on neither the decoder nor the scaling factor.
        """
        digest = hashlib.sha256()
        for part in ("encoder", "quant_conv"):
            for name, value in sorted(getattr(self.network, part).state_dict().items()):
                digest.update(f"{part}.{name} {tuple(value.shape)}\n".encode())
                digest.update(value.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
        return digest.hexdigest()[:12]

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError where a side, in pixels, is no multiple of the downsampling."""
        if height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"frames are {height}x{width}, but the autoencoder needs sides that are multiples of "
                f"{self.downsampling}"
            )

    @torch.no_grad()
    def encode(self, frames_NCHW: Tensor) -> Tensor:
        """Frames in [-1, 1], (N, 3, H, W) -> moments, (N, 2C, h, w): means, then log-variances, NOT scaled.

        Raises ValueError where a side is no multiple of the downsampling.
        """
        self.check_size(*frames_NCHW.shape[-2:])
        weight = self.network.quant_conv.weight
        moments = [
            self.network.quant_conv(self.network.encoder(few.to(weight.device, weight.dtype))).float()
            for few in frames_NCHW.split(self.chunk)
        ]
        return torch.cat(moments)

    def encode_clips(self, frames_BTCHW: Tensor) -> Tensor:
        """The same of clips: (B, T, 3, H, W) -> moments, (B, T, 2C, h, w)."""
        return self.encode(frames_BTCHW.flatten(0, 1)).unflatten(0, frames_BTCHW.shape[:2])

    @torch.no_grad()
    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        """Latents as the UNet sees them (scaled), (B, T, C, h, w) -> frames in [-1, 1], (B, T, 3, H, W).

        A video decoder mixes over the frames it is given together: `chunk` frames of one clip, never of two.
        """
        weight = self.network.quant_conv.weight
        clips = []
        for latents_TCHW in latents_BTCHW / self.scaling_factor:
            frames = []
            for few in latents_TCHW.split(self.chunk):
                together = {"num_frames": len(few)} if self.mixes_time else {}
                frames.append(self.network.decode(few.to(weight), **together).sample.float())
            clips.append(torch.cat(frames))
        return torch.stack(clips).clamp(-1, 1)


def posterior(moments: Tensor, noise: Tensor | None = None) -> Tensor:
    """A draw from the encoder's Gaussian, or its mean where `noise` is None.

    moments (..., 2C, h, w), noise standard normal (..., C, h, w) -> unscaled latents (..., C, h, w).
    Log-variances are clamped to [-30, 20], as the public code does (sgm distributions.py).
    """
    mean, log_variance = moments.chunk(2, dim=-3)
    if noise is None:
        return mean
    return mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
