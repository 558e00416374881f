"""The values that travel: what one floor of the house hands to the next.

    shards -> Clip -> Batch -> (latents, Conditioning) -> loss

Shape legend: B clips, T frames, C latent channels, M = 2C moments of them, H x W pixels, h x w latent
pixels (H/8 x W/8), L context tokens, D context width, S scalars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """One training clip, decoded or read from the latent cache, in host memory."""

    id: str
    """The sample's key: unique in its data set."""
    ordinal: int
    """Position in the run's global order. It seeds everything random about the clip."""
    frames_TCHW: Tensor
    """uint8 RGB, (T, 3, H, W); beside `moments_TMhw` only those that the network is given, the first or both
    ends, (1 or 2, 3, H, W)."""
    caption: str
    fps: float
    """Frames a second of the clip, after striding."""
    motion_bucket: float
    """0 to 255, from the motion score by the data set's own map."""
    elevation: float = math.nan
    """Of the camera that orbits an object, in degrees above the horizon; NaN where the data do not say it."""
    moments_TMhw: Tensor | None = None
    """float16, (T, 2C, h, w): what the autoencoder makes of every frame, from the latent cache."""
    context_LD: Tensor | None = None
    """float16: what the frozen CLIP makes of the frames or the caption that the network is told, cached."""
    still: bool = False
    """Every frame is the same still image, seen for itself."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch of clips of one shape, on one rank."""

    ids: tuple[str, ...]
    ordinals: tuple[int, ...]
    frames_BTCHW: Tensor
    """uint8 RGB, (B, T, 3, H, W); beside `moments_BTMhw` the given ones, (B, 1 or 2, 3, H, W)."""
    captions: tuple[str, ...]
    fps_B: Tensor
    """float32, (B,)."""
    motion_bucket_B: Tensor
    """float32, (B,)."""
    elevation_B: Tensor
    """float32, (B,)."""
    moments_BTMhw: Tensor | None = None
    """float16, (B, T, 2C, h, w): mean and log-variance of the unscaled latents; None: not cached."""
    context_BLD: Tensor | None = None
    """float16, (B, L, D): what CLIP makes of them; None: not cached."""
    still_B: Tensor | None = None
    """bool, (B,): which clips are still images; None: none is."""
    num_micro_batches: int = 1
    """Micro-batches that its rank takes in the same step."""

    @property
    def num_frames(self) -> int:
        """T, of a whole clip."""
        return (self.frames_BTCHW if self.moments_BTMhw is None else self.moments_BTMhw).shape[1]

    @staticmethod
    def from_clips(clips: list[Clip], num_micro_batches: int = 1) -> Batch:
        """Stack clips of equal shape, all of them with moments or none, and so with contexts."""
        moments = [clip.moments_TMhw for clip in clips if clip.moments_TMhw is not None]
        contexts = [clip.context_LD for clip in clips if clip.context_LD is not None]
        assert {len(moments), len(contexts)} <= {0, len(clips)}, "a cache is on or off"
        still = [clip.still for clip in clips]
        return Batch(
            ids=tuple(clip.id for clip in clips),
            ordinals=tuple(clip.ordinal for clip in clips),
            frames_BTCHW=torch.stack([clip.frames_TCHW for clip in clips]),
            captions=tuple(clip.caption for clip in clips),
            fps_B=torch.tensor([clip.fps for clip in clips], dtype=torch.float32),
            motion_bucket_B=torch.tensor([clip.motion_bucket for clip in clips], dtype=torch.float32),
            elevation_B=torch.tensor([clip.elevation for clip in clips], dtype=torch.float32),
            moments_BTMhw=torch.stack(moments) if moments else None,
            context_BLD=torch.stack(contexts) if contexts else None,
            still_B=torch.tensor(still) if any(still) else None,
            num_micro_batches=num_micro_batches,
        )

    def select(self, rows: Sequence[int]) -> Batch:
        """The clips at `rows`, in that order."""
        return replace(
            self._each(lambda tensor: tensor[list(rows)]),
            ids=tuple(self.ids[row] for row in rows),
            ordinals=tuple(self.ordinals[row] for row in rows),
            captions=tuple(self.captions[row] for row in rows),
        )

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor changed."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return Batch(**values | {name: change(tensor) for name, tensor in tensors.items()})

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told besides the noisy latents."""

    context_BLD: Tensor
    """Cross-attention tokens: text states (L = 77), or the CLIP tokens of the given frames (L = 1 or 2)."""
    scalars_BS: Tensor
    """Raw numbers, each embedded by the UNet: fps - 1, motion bucket, augmentation sigma, elevation, in that
    order, those of them that the network is told."""
    concat_BTCHW: Tensor | None = None
    """Latents joined to the UNet's input channels, (B, T, C, h, w), not scaled by the VAE's scaling factor,
    and for a masked network the mask."""
    image_only_BT: Tensor | None = None
    """bool: True where a frame is an independent still image, which takes the image path (alpha = 1)."""

    def unconditional(self) -> Conditioning:
        """The branch that classifier-free guidance subtracts: context and concat zero, scalars kept.

        A mask of zeros says that no frame is given: a masked network then has its embedding on every frame.
        """
        return replace(
            self,
            context_BLD=torch.zeros_like(self.context_BLD),
            concat_BTCHW=None if self.concat_BTCHW is None else torch.zeros_like(self.concat_BTCHW),
        )
