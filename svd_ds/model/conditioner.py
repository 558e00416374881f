"""What the UNet is told besides the noisy latents: text or image, frame rate, motion, noise augmentation.

    first frame ---- CLIP image encoder ---------> context, one token     (clean frame)
    caption -------- CLIP text encoder ----------> context, 77 tokens
    first frame ---- + sigma * noise -> encoder -> concat, on every frame (posterior mean, not scaled)
    fps - 1, motion bucket, sigma, elevation ----> scalars, raw

As in arXiv 2311.15127, sections 4.3 and D.4, and sgm's svd.yaml and encoders/modules.py. Noise augmentation
and dropout (for classifier-free guidance) are drawn by the clip: every frame of it is told the same.

To interpolate (D.5) a clip's ends are given, its first and last frame: two CLIP tokens, and latents at the
two places alone, with a mask as a further channel.

    both frames ---- encoder -> + sigma * noise -> concat, each on its frame, mask 1; elsewhere 0, mask 0

Shape legend: B clips, T frames, K given frames, C channels, H x W pixels, h x w latent pixels, L tokens,
D width, S scalars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svd_ds.batch import Conditioning
from svd_ds.model.autoencoder import Autoencoder, posterior
from svd_ds.model.clip_encoders import ImageEncoder, TextEncoder
from svd_ds.settings import Settings, choice, number

RELEASED_SCALARS = ("fps", "motion_bucket", "augmentation")
"""What the public weights are told, in their order."""
SCALARS = (*RELEASED_SCALARS, "elevation")
"""What there is to choose from."""


@dataclass(frozen=True)
class ConditionerConfig(Settings, section="conditioning"):
    """Which signals the UNet is given. The defaults are the released image-to-video model's."""

    context: str = choice("image", ("image", "ends", "text", "none"))
    """What the cross-attention sees: image (the first frame), ends (the first and the last), text or none."""
    concat: str = choice("image", ("image", "ends", "none"))
    """What is joined to the noisy latents, channel by channel: image (the first frame, on every frame), ends
    (the first and the last, each in its place, and a mask) or none."""
    scalars: tuple[str, ...] = choice(RELEASED_SCALARS, SCALARS)
    """The numbers embedded beside the noise level, in order."""
    context_width: int | None = number(None, ge=1, le=65_536)
    """Only with context "none": the width of the zero token the UNet is given in its place."""
    drop_context: float = number(0.1, ge=0, le=1)
    """Share of clips without the image tokens. The paper gives none: 0.1 is SVD_Xtend's, Vista has 0.15."""
    drop_text: float = number(0.15, ge=0, le=1)
    """Share of clips without the caption (arXiv 2311.15127, D.2)."""
    drop_concat: float = number(0.1, ge=0, le=1)
    """Share of clips without the concatenated frames, apart from the context's (sgm GeneralConditioner)."""
    drop_scalars: dict[str, float] = number(dict, ge=0, le=1)
    """A scalar's name -> share of clips without it, each apart from the others. The paper names none."""
    # Within these, no draw of sigma has a square beyond float32.
    augmentation_mean: float = number(-3.0, ge=-20, le=20)
    """Mean of ln sigma of the noise put on the conditioning frame (D.4): on its pixels in [-1, 1], or with
    concat "ends" on its latents, as the network sees them scaled to deviation 1."""
    augmentation_std: float = number(0.5, ge=0, le=3.5)
    """Standard deviation of ln sigma of that noise (D.4)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.scalars)) < len(self.scalars):
            raise ValueError(f"conditioning.scalars is {[*self.scalars]}: each may be named once")
        if "augmentation" in self.scalars and self.concat == "none":
            raise ValueError(
                "conditioning.scalars names augmentation, and conditioning.concat is none: no frame gets any "
                "noise"
            )
        if (self.context_width is not None) != (self.context == "none"):
            raise ValueError(
                f"conditioning.context_width is {self.context_width} and conditioning.context is "
                f"{self.context}: a width goes with the context none, and with no other"
            )
        for name in self.drop_scalars:
            if name not in self.scalars:
                raise ValueError(
                    f"conditioning.drop_scalars names {name}: it must be one of {', '.join(self.scalars)}, "
                    "which conditioning.scalars names"
                )

    @property
    def uses_last_frame(self) -> bool:
        """Whether the last frame is given beside the first."""
        return "ends" in (self.context, self.concat)

    @property
    def context_drop_rate(self) -> float:
        """The rate that goes with `context`."""
        rates = {"image": self.drop_context, "ends": self.drop_context, "text": self.drop_text, "none": 0.0}
        return rates[self.context]

    @property
    def num_tokens(self) -> int:
        """L, the context's length as the paper has it."""
        return {"image": 1, "ends": 2, "text": 77, "none": 1}[self.context]

    @property
    def concat_drop_rate(self) -> float:
        return 0.0 if self.concat == "none" else self.drop_concat

    @property
    def scalar_drop_rates(self) -> tuple[float, ...]:
        """A rate for each of SCALARS, in their order."""
        return tuple(self.drop_scalars.get(name, 0.0) for name in SCALARS)

    def augmentation_sigma(self, normal_B: Tensor) -> Tensor:
        """Standard normal draws -> the noise augmentation's sigma, one a clip, (B,)."""
        return torch.exp(self.augmentation_mean + self.augmentation_std * normal_B)


class Conditioner:
    """Given frames, captions and numbers -> Conditioning. Frozen: no graph is kept. Results are float32."""

    def __init__(
        self,
        config: ConditionerConfig,
        encoder: ImageEncoder | TextEncoder | None = None,
        cached_width: int | None = None,
    ) -> None:
        """`cached_width`: D of the states that every call is given in place of an `encoder`."""
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
        """Read the encoder that `config` asks for from a pipeline folder, or from a hub id.

        Raises FileNotFoundError where the folder lacks it.
        """
        if config.context == "none":
            return Conditioner(config)
        kind = TextEncoder if config.context == "text" else ImageEncoder
        return Conditioner(config, kind.load(path, device, dtype))

    @property
    def context_width(self) -> int:
        """D, what the UNet's cross-attention must take."""
        if self.encoder is not None:
            return self.encoder.width
        width = self.cached_width or self.config.context_width
        assert width is not None  # by ConditionerConfig, with context "none"
        return width

    def configured(self, config: ConditionerConfig) -> Conditioner:
        """The same encoder with another config."""
        return Conditioner(config, self.encoder, self.cached_width)

    @property
    def num_scalars(self) -> int:
        return len(self.config.scalars)

    def concat_channels(self, autoencoder: Autoencoder) -> int:
        """Input channels the UNet takes beyond the noisy latents' own."""
        return {
            "image": autoencoder.latent_channels,
            "ends": autoencoder.latent_channels + 1,
            "none": 0,
        }[self.config.concat]

    def noise_shape(self, autoencoder: Autoencoder, height: int, width: int) -> tuple[int, int, int, int]:
        """(K, C, H, W) of a clip's augmentation noise: of one frame's pixels, or of both ends' latents."""
        if self.config.concat != "ends":
            return 1, 3, height, width
        cell = autoencoder.downsampling
        return 2, autoencoder.latent_channels, height // cell, width // cell

    @torch.no_grad()
    def __call__(
        self,
        autoencoder: Autoencoder,
        *,
        first_frame_BCHW: Tensor,
        captions: Sequence[str],
        num_frames: int,
        fps_B: Tensor,
        motion_bucket_B: Tensor,
        augmentation_sigma_B: Tensor,
        elevation_B: Tensor,
        noise_BKCHW: Tensor,
        last_frame_BCHW: Tensor | None = None,
        context_BLD: Tensor | None = None,
        drop_context_B: Tensor | None = None,
        drop_concat_B: Tensor | None = None,
        drop_scalars_BS: Tensor | None = None,
    ) -> Conditioning:
        """Condition B clips of `num_frames` frames.

        first_frame_BCHW, last_frame_BCHW (B, 3, H, W) in [-1, 1], the last one needed only where a signal is
        "ends"; context_BLD what the encoder would make of them, where that was cached, or None; noise_BKCHW
        standard normal, of `noise_shape`; fps_B, motion_bucket_B, augmentation_sigma_B,
        elevation_B (B,), those that `scalars` does not name unused; drop_context_B, drop_concat_B bool (B,)
        and drop_scalars_BS bool (B, len(SCALARS)), or None to drop nothing. A dropped signal is zero, and a
        dropped scalar NaN, for which the UNet's embedding is zero. Returns context (B, L, D), scalars (B, S)
        and concat (B, T, C, h, w) or None.

        Raises ValueError for ends without a last frame, or without a frame between them.
        """
        frames = [first_frame_BCHW]
        if self.config.uses_last_frame:
            if last_frame_BCHW is None:
                raise ValueError("the network is conditioned on first and last frames, and no last is given")
            if num_frames < 3:
                raise ValueError(f"a clip of {num_frames} frames has none between its ends: 3 are the fewest")
            frames.append(last_frame_BCHW)
        context_BLD = self._context(frames, captions) if context_BLD is None else context_BLD.float()
        if drop_context_B is not None:
            context_BLD = context_BLD.masked_fill(drop_context_B[:, None, None], 0.0)
        every_scalar_BS = torch.stack([fps_B - 1, motion_bucket_B, augmentation_sigma_B, elevation_B], dim=1)
        if drop_scalars_BS is not None:
            every_scalar_BS = every_scalar_BS.masked_fill(drop_scalars_BS, torch.nan)
        given_BKChw = self._given(autoencoder, frames, augmentation_sigma_B, noise_BKCHW)
        if given_BKChw is not None and drop_concat_B is not None:
            given_BKChw = given_BKChw.masked_fill(drop_concat_B[:, None, None, None, None], 0.0)
        return Conditioning(
            context_BLD=context_BLD,
            scalars_BS=every_scalar_BS[:, [SCALARS.index(name) for name in self.config.scalars]].float(),
            concat_BTCHW=None if given_BKChw is None else _placed(given_BKChw, num_frames),
        )

    def _context(self, frames: Sequence[Tensor], captions: Sequence[str]) -> Tensor:
        """What the cross-attention sees, nothing dropped: (B, L, D)."""
        if isinstance(self.encoder, ImageEncoder):
            seen = frames if self.config.context == "ends" else frames[:1]
            return torch.cat([self.encoder(frame_BCHW) for frame_BCHW in seen], dim=1)
        if isinstance(self.encoder, TextEncoder):
            return self.encoder(captions)
        assert self.config.context == "none", "without an encoder every call is given its states"
        return frames[0].new_zeros((len(frames[0]), 1, self.context_width))

    def _given(
        self, autoencoder: Autoencoder, frames: Sequence[Tensor], sigma_B: Tensor, noise_BKCHW: Tensor
    ) -> Tensor | None:
        """What is joined to the input of each given frame, nothing dropped: (B, K, C, h, w)."""
        sigma_BKCHW = sigma_B[:, None, None, None, None]
        if self.config.concat == "image":
            noised_BKCHW = frames[0][:, None] + sigma_BKCHW * noise_BKCHW
            return posterior(autoencoder.encode(noised_BKCHW[:, 0]))[:, None]
        if self.config.concat == "ends":
            latents = [posterior(autoencoder.encode(frame_BCHW)) for frame_BCHW in frames]
            noised_BKChw = (
                torch.stack(latents, dim=1) + sigma_BKCHW / autoencoder.scaling_factor * noise_BKCHW
            )
            return torch.cat([noised_BKChw, torch.ones_like(noised_BKChw[:, :, :1])], dim=2)
        return None


def _placed(given_BKChw: Tensor, num_frames: int) -> Tensor:
    """(B, T, C, h, w): one given frame seen T times (a view, not T copies), two at the clip's ends."""
    num_clips, num_given, *shape = given_BKChw.shape
    if num_given == 1:
        return given_BKChw.expand(-1, num_frames, -1, -1, -1)
    concat_BTChw = given_BKChw.new_zeros(num_clips, num_frames, *shape)
    concat_BTChw[:, [0, -1]] = given_BKChw
    return concat_BTChw
