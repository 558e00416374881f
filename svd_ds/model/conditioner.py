"""Conditioning signals of the UNet: text or image, frame rate, motion, noise augmentation and other scalars.

    first frame ---- CLIP image encoder ---------> context, one token     (clean frame)
    caption -------- CLIP text encoder ----------> context, 77 tokens
    first frame ---- + sigma * noise -> encoder -> concat, on every frame (posterior mean, not scaled)
    fps - 1, motion bucket, sigma, ... ----------> scalars, raw           (svd_ds/scalars.py)

As in arXiv 2311.15127, sections 4.3 and D.4, and sgm's svd.yaml and encoders/modules.py. Noise augmentation
and dropout (for classifier-free guidance) are drawn once for a clip: all of its frames share them.

For interpolation (D.5) the first and the last frame of a clip are given: two CLIP tokens, and latents on only
these two frames, with a mask as a further channel.

    both frames ---- encoder -> + sigma * noise -> concat, each on its frame, mask 1; elsewhere 0, mask 0

Shape legend: B clips, T frames, K given frames, C channels, H x W pixels, h x w latent pixels, L tokens,
D width, S scalars.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svd_ds.batch import Conditioning
from svd_ds.model.autoencoder import Autoencoder, posterior
from svd_ds.model.clip_encoders import ImageEncoder, TextEncoder
from svd_ds.scalars import AUGMENTATION, RELEASED_SCALARS, SCALARS
from svd_ds.settings import Settings, choice, number


@dataclass(frozen=True)
class ConditionerConfig(Settings, section="conditioning"):
    """Conditioning signals. The defaults are the released image-to-video model's."""

    context: str = choice("image", ("image", "ends", "text", "none"))
    """Input of the cross-attention: image (the first frame), ends (the first and the last), text or none."""
    concat: str = choice("image", ("image", "ends", "none"))
    """Latents concatenated to the noisy ones, channel by channel: image (the first frame, on every frame),
    ends (the first and the last, each on its own frame, and a mask) or none."""
    scalars: tuple[str, ...] = choice(RELEASED_SCALARS, SCALARS.keys())
    """Scalar conditions (svd_ds/scalars.py), in the order of their embeddings."""
    context_width: int | None = number(None, ge=1, le=65_536)
    """Width of the zero token that the UNet gets with context "none"; null with any other context."""
    drop_context: float = number(0.1, ge=0, le=1)
    """Share of clips without the image tokens. The paper gives none: 0.1 is SVD_Xtend's, Vista has 0.15."""
    drop_text: float = number(0.15, ge=0, le=1)
    """Share of clips without the caption (arXiv 2311.15127, D.2)."""
    drop_concat: float = number(0.1, ge=0, le=1)
    """Share of clips without the concatenated frames, drawn independently of the context's (sgm
    GeneralConditioner)."""
    drop_scalars: dict[str, float] = number(dict, ge=0, le=1)
    """Scalar -> share of clips without it, drawn independently of the others. The paper drops none."""
    # Within these bounds the square of sigma never overflows float32.
    augmentation_mean: float = number(-3.0, ge=-20, le=20)
    """Mean of ln sigma of the noise that is added to the conditioning frame (D.4): to its pixels in [-1, 1],
    or with concat "ends" to its latents, in units of the scaled latents, whose deviation is 1."""
    augmentation_std: float = number(0.5, ge=0, le=3.5)
    """Standard deviation of ln sigma of that noise (D.4)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.scalars)) < len(self.scalars):
            raise ValueError(f"conditioning.scalars is {[*self.scalars]}: no name may occur twice")
        if AUGMENTATION.name in self.scalars and self.concat == "none":
            raise ValueError(
                "conditioning.scalars names augmentation and conditioning.concat is none: there is no frame "
                "that gets noise"
            )
        if (self.context_width is not None) != (self.context == "none"):
            raise ValueError(
                f"conditioning.context_width is {self.context_width} and conditioning.context is "
                f"{self.context}: the width must be given with the context none, and null with any other"
            )
        for name in self.drop_scalars:
            if name not in self.scalars:
                raise ValueError(
                    f"conditioning.drop_scalars names {name}: it must be one of {', '.join(self.scalars)}, "
                    "the values of conditioning.scalars"
                )

    @property
    def uses_last_frame(self) -> bool:
        """True if the last frame is given as well as the first."""
        return "ends" in (self.context, self.concat)

    @property
    def context_drop_rate(self) -> float:
        """Share of clips without their context."""
        rates = {"image": self.drop_context, "ends": self.drop_context, "text": self.drop_text, "none": 0.0}
        return rates[self.context]

    @property
    def num_tokens(self) -> int:
        """Length of the context, L, in the paper's networks."""
        return {"image": 1, "ends": 2, "text": 77, "none": 1}[self.context]

    @property
    def concat_drop_rate(self) -> float:
        """Share of clips without their concatenated frames."""
        return 0.0 if self.concat == "none" else self.drop_concat

    def augmentation_sigma(self, normal: Tensor) -> Tensor:
        """Turn standard normal draws into the noise augmentation's sigma: (B,) -> (B,)."""
        return torch.exp(self.augmentation_mean + self.augmentation_std * normal)


class Conditioner:
    """Computes the conditioning from frames, captions and scalars, in float32 and without autograd."""

    def __init__(
        self,
        config: ConditionerConfig,
        encoder: ImageEncoder | TextEncoder | None = None,
        cached_width: int | None = None,
    ) -> None:
        """
        Args:
            encoder: encoder of images or text; None without one, or if cached embeddings are used.
            cached_width: width D of the cached CLIP embeddings, which every call then gets as `context`.
        """
        self.config = config
        self.encoder = encoder
        self.cached_width = cached_width

    @staticmethod
    def load(
        config: ConditionerConfig,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Conditioner:
        """Read the encoder that `config` needs from a pipeline folder, or from a hub id.

        Raises:
            FileNotFoundError: the pipeline lacks the encoder.
        """
        if config.context == "none":
            return Conditioner(config)
        kind = TextEncoder if config.context == "text" else ImageEncoder
        return Conditioner(config, kind.load(path, device, dtype))

    @property
    def context_width(self) -> int:
        """Width of the context, D: the UNet's `context_width`."""
        if self.encoder is not None:
            return self.encoder.width
        width = self.cached_width or self.config.context_width
        assert width is not None  # by ConditionerConfig, with context "none"
        return width

    def with_config(self, config: ConditionerConfig) -> Conditioner:
        """Return a conditioner with the same encoder and another config."""
        return Conditioner(config, self.encoder, self.cached_width)

    @property
    def num_scalars(self) -> int:
        """Number of scalars, S."""
        return len(self.config.scalars)

    def concat_channels(self, autoencoder: Autoencoder) -> int:
        """Return the number of the UNet's input channels besides those of the noisy latents."""
        channels = autoencoder.latent_channels
        return {"image": channels, "ends": channels + 1, "none": 0}[self.config.concat]

    def tokenize(self, captions: Sequence[str]) -> Tensor | None:
        """Return the token ids of captions, int64, (B, L), in host memory; None without a text encoder."""
        return self.encoder.tokenize(captions) if isinstance(self.encoder, TextEncoder) else None

    def noise_shape(self, autoencoder: Autoencoder, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the shape (K, C, H, W) of a clip's augmentation noise.

        It is that of one frame's pixels, or with concat "ends" that of the latents of both ends.

        Args:
            height: height of a frame in pixels.
            width: width of a frame in pixels.
        """
        if self.config.concat != "ends":
            return 1, 3, height, width
        cell = autoencoder.downsampling
        return 2, autoencoder.latent_channels, height // cell, width // cell

    @torch.no_grad()
    def __call__(
        self,
        autoencoder: Autoencoder,
        *,
        first_frame: Tensor,
        captions: Sequence[str],
        num_frames: int,
        scalars: Mapping[str, Tensor],
        noise: Tensor,
        last_frame: Tensor | None = None,
        context: Tensor | None = None,
        tokens: Tensor | None = None,
        drop_context: Tensor | None = None,
        drop_concat: Tensor | None = None,
        drop_scalars: Mapping[str, Tensor] | None = None,
    ) -> Conditioning:
        """Compute the conditioning of B clips of `num_frames` frames.

        A dropped signal is zero, and a dropped scalar NaN, for which the UNet's embedding is zero.

        Args:
            first_frame: (B, 3, H, W) in [-1, 1].
            captions: one for each clip, read by a text encoder.
            scalars: scalar -> (B,); at least those of `config.scalars`, and augmentation (sigma) if frames
                are concatenated.
            noise: standard normal, (B, K, C, H, W), of `noise_shape`.
            last_frame: (B, 3, H, W) in [-1, 1]; needed only if `config.context` or `config.concat` is "ends".
            context: cached output of the encoder, (B, L, D); None computes it.
            tokens: result of `tokenize`, on the encoder's device; None computes it.
            drop_context: bool, (B,); None drops nothing.
            drop_concat: bool, (B,); None drops nothing.
            drop_scalars: scalar -> bool, (B,); those without an entry are kept.

        Raises:
            ValueError: a scalar has no value; or both ends of a clip are needed, and there is no last frame
                or no frame between them.
        """
        frames = self._given_frames(first_frame, last_frame, num_frames)
        context_BLD = self._context(frames, captions, tokens) if context is None else context.float()
        if drop_context is not None:
            context_BLD = context_BLD.masked_fill(drop_context[:, None, None], 0.0)
        given_BKChw = self._given(autoencoder, frames, scalars, noise)
        if given_BKChw is not None and drop_concat is not None:
            given_BKChw = given_BKChw.masked_fill(drop_concat[:, None, None, None, None], 0.0)
        columns = [self._scalar(name, scalars, drop_scalars or {}) for name in self.config.scalars]
        return Conditioning(
            context_BLD=context_BLD,
            scalars_BS=torch.stack(columns, dim=1) if columns else first_frame.new_zeros(len(first_frame), 0),
            concat_BTChw=None if given_BKChw is None else _expand_to_clip(given_BKChw, num_frames),
        )

    def _given_frames(self, first: Tensor, last: Tensor | None, num_frames: int) -> list[Tensor]:
        """Return the conditioning frames, each (B, 3, H, W): the first, or the first and the last."""
        if not self.config.uses_last_frame:
            return [first]
        if last is None:
            raise ValueError(
                f"conditioning.context is {self.config.context} and conditioning.concat is "
                f"{self.config.concat}: last_frame must be given"
            )
        if num_frames < 3:
            raise ValueError(
                f"num_frames is {num_frames}: with the first and the last frame given it must be at least 3"
            )
        return [first, last]

    def _scalar(self, name: str, scalars: Mapping[str, Tensor], drop: Mapping[str, Tensor]) -> Tensor:
        """Return the number that the UNet embeds, (B,) float32; NaN where it is dropped."""
        if name not in scalars:
            raise ValueError(f"conditioning.scalars names {name}: sampling.scalars.{name} must be given")
        value_B = scalars[name].float()
        if offset := SCALARS[name].offset:
            value_B = value_B + offset
        return value_B.masked_fill(drop[name], torch.nan) if name in drop else value_B

    def _context(self, frames: Sequence[Tensor], captions: Sequence[str], tokens_BL: Tensor | None) -> Tensor:
        """Compute the context before dropout: (B, L, D)."""
        if isinstance(self.encoder, ImageEncoder):
            encoded = frames if self.config.context == "ends" else frames[:1]
            return torch.cat([self.encoder(frame_BCHW) for frame_BCHW in encoded], dim=1)
        if isinstance(self.encoder, TextEncoder):
            return self.encoder(captions, tokens_BL)
        assert self.config.context == "none", "without an encoder every call is given a cached context"
        return frames[0].new_zeros((len(frames[0]), 1, self.context_width))

    def _given(
        self,
        autoencoder: Autoencoder,
        frames: Sequence[Tensor],
        scalars: Mapping[str, Tensor],
        noise_BKCHW: Tensor,
    ) -> Tensor | None:
        """Compute the latents (and the mask, if any) of each given frame before dropout: (B, K, C, h, w)."""
        if self.config.concat == "none":
            return None
        sigma_BKCHW = scalars[AUGMENTATION.name][:, None, None, None, None]
        if self.config.concat == "image":
            noised_BKCHW = frames[0][:, None] + sigma_BKCHW * noise_BKCHW
            return posterior(autoencoder.encode(noised_BKCHW[:, 0]))[:, None]
        latents = [posterior(autoencoder.encode(frame_BCHW)) for frame_BCHW in frames]
        noised_BKChw = torch.stack(latents, dim=1) + sigma_BKCHW / autoencoder.scaling_factor * noise_BKCHW
        return torch.cat([noised_BKChw, torch.ones_like(noised_BKChw[:, :, :1])], dim=2)


def _expand_to_clip(given_BKChw: Tensor, num_frames: int) -> Tensor:
    """Expand given frames to (B, T, C, h, w): one is repeated on all frames (a view), two are at the ends."""
    num_clips, num_given, *shape = given_BKChw.shape
    if num_given == 1:
        return given_BKChw.expand(-1, num_frames, -1, -1, -1)
    concat_BTChw = given_BKChw.new_zeros(num_clips, num_frames, *shape)
    # Not by [0, -1]: a list of indices is copied to the device, and waited for.
    concat_BTChw[:, 0], concat_BTChw[:, -1] = given_BKChw[:, 0], given_BKChw[:, 1]
    return concat_BTChw
