"""Data types that are passed between layers.

    shards -> Clip -> Batch -> (latents, Conditioning) -> loss

Shape legend: B clips, T frames, C latent channels, M = 2C moments of them, H x W pixels, h x w latent
pixels (H/8 x W/8), K conditioning frames, N conditioning signals, L context tokens, D context width,
S scalars.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from svd_ds.scalars import signal_names


@dataclass(frozen=True)
class Clip:
    """One training clip, decoded or read from the latent cache, in host memory."""

    id: str
    """Key of the sample, unique in its data set."""
    ordinal: int
    """Sample ordinal in the run's global order; it seeds everything random about the clip."""
    frames_TCHW: Tensor
    """uint8 RGB, (T, 3, H, W). With `moments_TMhw` only the conditioning frames: the first, or the first and
    the last, (1 or 2, 3, H, W)."""
    caption: str
    scalars: dict[str, float]
    """Scalar condition (svd_ds/scalars.py) -> value; NaN if the sample does not have it."""
    moments_TMhw: Tensor | None = None
    """Mean and log-variance of every frame's latents, from the latent cache: float16, (T, 2C, h, w)."""
    context_LD: Tensor | None = None
    """Cached CLIP embeddings of the conditioning frames or of the caption: float16, (L, D)."""
    still: bool = False
    """True if every frame is the same still image, which takes the image path."""


@dataclass(frozen=True)
class Draws:
    """Standard uniform and normal numbers of a batch (diffusion/draws.py); the code that uses them scales
    them."""

    u_B: Tensor
    """float64, uniform in (0, 1): becomes sigma through `NoiseSchedule.quantile`."""
    augmentation_B: Tensor
    """float64, standard normal: becomes ln sigma of the conditioning frames' noise."""
    drop_BN: Tensor
    """float64, uniform in [0, 1): a column for each of `signal_names`, then unused ones."""
    noise_BTChw: Tensor
    """float32, standard normal (plus offset noise): the n of x = x0 + sigma n."""
    posterior_noise_BTChw: Tensor
    """float32, standard normal: samples the autoencoder's posterior."""
    given_noise_BKCHW: Tensor
    """float32, standard normal: noise of the conditioning frames, on their pixels or their latents."""

    def drop(self, signal: str, rate: float) -> Tensor:
        """Choose the clips whose `signal` is dropped, a share `rate` of all clips: bool, (B,)."""
        return self.drop_BN[:, signal_names().index(signal)] < rate

    def map(self, function: Callable[[Tensor], Tensor]) -> Draws:
        """Apply `function` to every tensor."""
        return Draws(*(function(getattr(self, field.name)) for field in fields(self)))


@dataclass(frozen=True)
class Batch:
    """A micro-batch of clips of one shape, on one rank."""

    ids: tuple[str, ...]
    ordinals: tuple[int, ...]
    """Sample ordinals."""
    frames_BTCHW: Tensor
    """uint8 RGB, (B, T, 3, H, W); with `moments_BTMhw` only the conditioning frames, (B, 1 or 2, 3, H, W)."""
    captions: tuple[str, ...]
    scalars_B: dict[str, Tensor]
    """Scalar condition -> float32, (B,)."""
    moments_BTMhw: Tensor | None = None
    """Mean and log-variance of the unscaled latents: float16, (B, T, 2C, h, w); None if not cached."""
    context_BLD: Tensor | None = None
    """CLIP embeddings: float16, (B, L, D); None if not cached."""
    still_B: Tensor | None = None
    """Mask of the clips that are still images: bool, (B,); None if there are none."""
    num_micro_batches: int = 1
    """Number of micro-batches that its rank processes in the same step."""
    draws: Draws | None = None
    """Random numbers of the clips; None until `Objective.draw`."""
    tokens_BL: Tensor | None = None
    """CLIP's token ids of the captions: int64, (B, L); None until `Objective.draw`, and if no caption is
    read."""

    @property
    def num_frames(self) -> int:
        """Number of frames of a complete clip, T."""
        return (self.frames_BTCHW if self.moments_BTMhw is None else self.moments_BTMhw).shape[1]

    @staticmethod
    def from_clips(clips: list[Clip], num_micro_batches: int = 1) -> Batch:
        """Stack clips of equal shape, of which either all or none have moments, and likewise contexts."""
        moments = [clip.moments_TMhw for clip in clips if clip.moments_TMhw is not None]
        contexts = [clip.context_LD for clip in clips if clip.context_LD is not None]
        assert {len(moments), len(contexts)} <= {0, len(clips)}, "a cache is on or off"
        still = [clip.still for clip in clips]
        return Batch(
            ids=tuple(clip.id for clip in clips),
            ordinals=tuple(clip.ordinal for clip in clips),
            frames_BTCHW=torch.stack([clip.frames_TCHW for clip in clips]),
            captions=tuple(clip.caption for clip in clips),
            scalars_B={
                name: torch.tensor([clip.scalars[name] for clip in clips], dtype=torch.float32)
                for name in clips[0].scalars
            },
            moments_BTMhw=torch.stack(moments) if moments else None,
            context_BLD=torch.stack(contexts) if contexts else None,
            still_B=torch.tensor(still) if any(still) else None,
            num_micro_batches=num_micro_batches,
        )

    def select(self, rows: Sequence[int]) -> Batch:
        """Return the clips at `rows`, in that order."""
        return replace(
            self.map(lambda tensor: tensor[list(rows)]),
            ids=tuple(self.ids[row] for row in rows),
            ordinals=tuple(self.ordinals[row] for row in rows),
            captions=tuple(self.captions[row] for row in rows),
        )

    def to(self, device: torch.device) -> Batch:
        """Copy every tensor to `device`. Copies from pinned host memory are not waited for."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Apply `function` to every tensor."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}
        scalars_B = {name: function(value_B) for name, value_B in self.scalars_B.items()}
        draws = None if self.draws is None else self.draws.map(function)
        return Batch(**values | tensors | {"scalars_B": scalars_B, "draws": draws})

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Conditioning:
    """Inputs of the UNet other than the noisy latents."""

    context_BLD: Tensor
    """Cross-attention tokens: text embeddings (L = 77), or CLIP tokens of the conditioning frames (L = 1 or
    2)."""
    scalars_BS: Tensor
    """Raw values of `conditioning.scalars`, in that order, each embedded by the UNet; NaN: dropped."""
    concat_BTChw: Tensor | None = None
    """Latents concatenated to the UNet's input channels, (B, T, C, h, w), not multiplied by the VAE's scaling
    factor; for a masked network the last channel is the mask."""
    image_only_BT: Tensor | None = None
    """Mask of the frames that are independent still images, which take the image path (alpha = 1): bool."""

    def unconditional(self) -> Conditioning:
        """Return the branch that classifier-free guidance subtracts: context and concat zero, scalars kept.

        A mask of zeros means that no frame is given: a masked network then uses its mask embedding for every
        frame.
        """
        return replace(
            self,
            context_BLD=torch.zeros_like(self.context_BLD),
            concat_BTChw=None if self.concat_BTChw is None else torch.zeros_like(self.concat_BTChw),
        )
