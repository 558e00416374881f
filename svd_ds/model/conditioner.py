"""What the UNet is told besides the noisy latents: text or image, frame rate, motion, noise augmentation.

    first frame ---- CLIP image encoder ---------> context, one token     (clean frame)
    caption -------- CLIP text encoder ----------> context, 77 tokens
    first frame ---- + sigma * noise -> encoder -> concat, on every frame (posterior mean, not scaled)
    fps - 1, motion bucket, sigma ---------------> scalars, raw

As in arXiv 2311.15127, sections 4.3 and D.4, and sgm's svd.yaml and encoders/modules.py. Noise augmentation
and dropout (for classifier-free guidance) are drawn by the clip: every frame of it is told the same.

Shape legend: B clips, T frames, C channels, H x W pixels, h x w latent pixels, L tokens, D width, S scalars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svd_ds.batch import Conditioning
from svd_ds.model.autoencoder import Autoencoder, posterior
from svd_ds.model.clip import ImageEncoder, TextEncoder

SCALARS = ("fps", "motion_bucket", "augmentation")
"""What there is to choose from; in this order in the public weights."""


@dataclass(frozen=True)
class ConditionerConfig:
    """Which signals the UNet is given. The defaults are the released image-to-video model's."""

    context: str = "image"
    """What the cross-attention sees."""
    concat: str = "image"
    """What is joined to the noisy latents, channel by channel."""
    scalars: tuple[str, ...] = SCALARS
    """The numbers embedded beside the noise level, in order."""
    context_width: int | None = None
    """Only with context "none": the width of the zero token the UNet is given in its place."""
    drop_context: float = 0.1
    """Share of clips without the image token. The paper gives none: 0.1 is SVD_Xtend's, Vista has 0.15."""
    drop_text: float = 0.15
    """Share of clips without the caption (arXiv 2311.15127, D.2)."""
    drop_concat: float = 0.1
    """Share of clips without the concatenated frame, apart from the context's (sgm GeneralConditioner)."""
    augmentation_mean: float = -3.0
    """Mean of ln sigma of the noise put on the conditioning frame (D.4)."""
    augmentation_std: float = 0.5
    """Standard deviation of ln sigma of that noise (D.4)."""

    def __post_init__(self) -> None:
        if self.context not in ("image", "text", "none"):
            raise ValueError(f'context is "{self.context}", but must be one of "image", "text", "none"')
        if self.concat not in ("image", "none"):
            raise ValueError(f'concat is "{self.concat}", but must be one of "image", "none"')
        unknown = [name for name in self.scalars if name not in SCALARS]
        if unknown or len(set(self.scalars)) < len(self.scalars):
            raise ValueError(
                f"scalars are {[*self.scalars]}, but must be different names out of {[*SCALARS]}"
            )
        if "augmentation" in self.scalars and self.concat == "none":
            raise ValueError('scalars name "augmentation", but with concat "none" no frame gets any noise')
        if (self.context_width is not None) != (self.context == "none"):
            raise ValueError(
                f'context_width is {self.context_width} with context "{self.context}", '
                'but goes with context "none", and with no other'
            )
        for name in ("drop_context", "drop_text", "drop_concat"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must lie between 0 and 1")
        if self.augmentation_std < 0:
            raise ValueError(f"augmentation_std is {self.augmentation_std}, but must not be negative")

    @property
    def context_drop_rate(self) -> float:
        """The rate that goes with `context`."""
        return {"image": self.drop_context, "text": self.drop_text, "none": 0.0}[self.context]

    @property
    def concat_drop_rate(self) -> float:
        return self.drop_concat if self.concat == "image" else 0.0

    def augmentation_sigma(self, normal_B: Tensor) -> Tensor:
        """Standard normal draws -> the noise augmentation's sigma, one a clip, (B,)."""
        return torch.exp(self.augmentation_mean + self.augmentation_std * normal_B)


class Conditioner:
    """First frames, captions and numbers -> Conditioning. Frozen: no graph is kept. Results are float32."""

    def __init__(self, config: ConditionerConfig, encoder: ImageEncoder | TextEncoder | None = None) -> None:
        self.config = config
        self.encoder = encoder

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
        kind = ImageEncoder if config.context == "image" else TextEncoder
        return Conditioner(config, kind.load(path, device, dtype))

    @property
    def context_width(self) -> int:
        """D, what the UNet's cross-attention must take."""
        if self.encoder is not None:
            return self.encoder.width
        assert self.config.context_width is not None  # by ConditionerConfig, with context "none"
        return self.config.context_width

    @property
    def num_scalars(self) -> int:
        return len(self.config.scalars)

    def concat_channels(self, autoencoder: Autoencoder) -> int:
        """Input channels the UNet takes beyond the noisy latents' own."""
        return autoencoder.latent_channels if self.config.concat == "image" else 0

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
        pixel_noise_BCHW: Tensor,
        drop_context_B: Tensor | None = None,
        drop_concat_B: Tensor | None = None,
    ) -> Conditioning:
        """Condition B clips of `num_frames` frames.

        first_frame_BCHW (B, 3, H, W) in [-1, 1]; pixel_noise_BCHW standard normal, of its shape;
        fps_B, motion_bucket_B, augmentation_sigma_B (B,); drop_context_B, drop_concat_B bool (B,), or None to
        drop nothing. A dropped signal is zero; scalars are never dropped. Returns context (B, L, D), scalars
        (B, S) and concat (B, T, C, h, w) or None: one frame seen T times (an expanded view), not T copies.
        """
        context_BLD = self.context(first_frame_BCHW, captions)
        if drop_context_B is not None:
            context_BLD = context_BLD.masked_fill(drop_context_B[:, None, None], 0.0)
        every_scalar_BS = torch.stack([fps_B - 1, motion_bucket_B, augmentation_sigma_B], dim=1).float()
        concat_BTCHW = None
        if self.config.concat == "image":
            noised_BCHW = first_frame_BCHW + augmentation_sigma_B[:, None, None, None] * pixel_noise_BCHW
            concat_BCHW = posterior(autoencoder.encode(noised_BCHW))
            if drop_concat_B is not None:
                concat_BCHW = concat_BCHW.masked_fill(drop_concat_B[:, None, None, None], 0.0)
            concat_BTCHW = concat_BCHW[:, None].expand(-1, num_frames, -1, -1, -1)
        return Conditioning(
            context_BLD=context_BLD,
            scalars_BS=every_scalar_BS[:, [SCALARS.index(name) for name in self.config.scalars]],
            concat_BTCHW=concat_BTCHW,
        )

    def context(self, first_frame_BCHW: Tensor, captions: Sequence[str]) -> Tensor:
        """What the cross-attention sees, nothing dropped: (B, L, D)."""
        if isinstance(self.encoder, ImageEncoder):
            return self.encoder(first_frame_BCHW)
        if isinstance(self.encoder, TextEncoder):
            return self.encoder(captions)
        return first_frame_BCHW.new_zeros((len(first_frame_BCHW), 1, self.context_width))
