"""Random numbers of a batch, drawn clip by clip from a generator seeded by (seed, sample ordinal).

Therefore they do not depend on the rank or micro-batch of a clip. Within a clip they are drawn in the order
of the fields of `Draws`, offset noise last.

Shape legend: T frames, K conditioning frames, C channels, H x W pixels or latent pixels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from svd_ds.batch import Draws
from svd_ds.scalars import signal_names

NUM_SIGNALS = 8
"""Number of columns of `drop_BN` that come from the clip's generator. Further columns come from a second
generator, so that a new signal does not change any other number."""

TAIL = 2.0**-32
"""Distance of u from 0 and 1, where a quantile may be infinite: 6.2 standard deviations of a normal."""


def draw(
    seed: int,
    ordinals: Sequence[int],
    latent_shape: tuple[int, int, int, int],
    given_shape: tuple[int, int, int, int],
    offset_noise: float = 0.0,
) -> Draws:
    """Draw the random numbers of the clips at `ordinals`, in host memory. Any thread may call it.

    Args:
        ordinals: sample ordinals, one for each clip.
        latent_shape: (T, C, h, w) of a clip's latents.
        given_shape: (K, C, H, W) of a clip's conditioning frames, pixels or latents.
        offset_noise: scale of one more normal number for each channel, the same for all frames and pixels of
            a clip (https://www.crosslabs.org/blog/diffusion-with-offset-noise, and Stability-AI's
            generative-models).
    """
    clips = [_draw_clip(seed, ordinal, latent_shape, given_shape, offset_noise) for ordinal in ordinals]
    u, augmentation, drop, noise, posterior_noise, given_noise = (
        torch.from_numpy(np.stack(column)) for column in zip(*clips, strict=True)
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
    # few to give each of the paper's 77 million clips its own stream.
    generator = np.random.default_rng((seed, ordinal))
    u = np.asarray(generator.uniform(TAIL, 1 - TAIL))
    augmentation = np.asarray(generator.standard_normal())
    drop = generator.random(NUM_SIGNALS)
    if (more := len(signal_names()) - NUM_SIGNALS) > 0:
        # A spawned generator leaves this one's stream as it is.
        drop = np.concatenate([drop, generator.spawn(1)[0].random(more)])
    noise = generator.standard_normal(latent_shape, dtype=np.float32)
    posterior_noise = generator.standard_normal(latent_shape, dtype=np.float32)
    given_noise = generator.standard_normal(given_shape, dtype=np.float32)
    if offset_noise > 0:
        num_channels = latent_shape[1]
        offset = generator.standard_normal((1, num_channels, 1, 1), dtype=np.float32)
        noise += np.float32(offset_noise) * offset
    return u, augmentation, drop, noise, posterior_noise, given_noise
