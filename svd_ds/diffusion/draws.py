"""Everything random about a batch, drawn a clip at a time from a generator seeded by (seed, ordinal).

A clip's ordinal is its place in the run's global order, so these numbers do not depend on how the clips are
dealt to ranks or cut into micro-batches. Within a clip they are drawn in the order of the fields of `Draws`,
offset noise last.

Shape legend: B clips, T frames, K given frames, C channels, H x W pixels or latent pixels, h x w latent
pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NUM_SIGNALS = 8
"""Columns of `drop_BS`: more than there are signals to drop, so that a new one does not move the old ones."""

TAIL = 2.0**-32
"""u keeps this far from 0 and 1, where a quantile may be infinite: 6.2 standard deviations of a normal."""


@dataclass(frozen=True)
class Draws:
    """Standard numbers: what they are turned into is decided where they are used."""

    u_B: Tensor
    """float64, uniform in (0, 1): becomes sigma through `Noise.quantile`."""
    augmentation_B: Tensor
    """float64, standard normal: becomes ln of the conditioning frame's noise level."""
    drop_BS: Tensor
    """float64, uniform in [0, 1): a conditioning signal is dropped where its column is below its rate."""
    noise_BTChw: Tensor
    """float32, standard normal (plus offset noise): the n of x = x0 + sigma n."""
    posterior_noise_BTChw: Tensor
    """float32, standard normal: samples the autoencoder's posterior."""
    given_noise_BKCHW: Tensor
    """float32, standard normal: the noise put on the given frames, their pixels or their latents."""


def draw(
    seed: int,
    ordinals: Sequence[int],
    latent_shape: tuple[int, int, int, int],
    given_shape: tuple[int, int, int, int],
    device: torch.device | str = "cpu",
    offset_noise: float = 0.0,
) -> Draws:
    """Draw for the clips at `ordinals`; latent_shape (T, C, h, w), given_shape (K, C, H, W).

    Offset noise (https://www.crosslabs.org/blog/diffusion-with-offset-noise) is one normal number a channel,
    the same for all frames and pixels of the clip as in Stability-AI/generative-models, times `offset_noise`.
    """
    clips = [_draw_clip(seed, ordinal, latent_shape, given_shape, offset_noise) for ordinal in ordinals]
    u, augmentation, drop, noise, posterior_noise, given_noise = (
        torch.from_numpy(np.stack(column)).to(device) for column in zip(*clips, strict=True)
    )
    return Draws(u, augmentation, drop, noise, posterior_noise, given_noise)


def _draw_clip(
    seed: int,
    ordinal: int,
    latent_shape: tuple[int, int, int, int],
    given_shape: tuple[int, int, int, int],
    offset_noise: float,
) -> tuple[np.ndarray, ...]:
    # numpy hashes the pair into 128 bits of state; torch's CPU generator would keep 32 bits of a seed, too
    # few to give each of the paper's 77 million clips a stream of its own.
    generator = np.random.default_rng((seed, ordinal))
    u = np.asarray(generator.uniform(TAIL, 1 - TAIL))
    augmentation = np.asarray(generator.standard_normal())
    drop = generator.random(NUM_SIGNALS)
    noise = generator.standard_normal(latent_shape, dtype=np.float32)
    posterior_noise = generator.standard_normal(latent_shape, dtype=np.float32)
    given_noise = generator.standard_normal(given_shape, dtype=np.float32)
    if offset_noise > 0:
        num_channels = latent_shape[1]
        offset = generator.standard_normal((1, num_channels, 1, 1), dtype=np.float32)
        noise += np.float32(offset_noise) * offset
    return u, augmentation, drop, noise, posterior_noise, given_noise
