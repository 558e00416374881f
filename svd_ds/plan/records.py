"""Records of a tracked step: storages, their allocation and release, and operations. Plain data."""

from __future__ import annotations

from typing import NamedTuple

CONSTANT, CLIP, FRAME = range(3)
"""Scale of a storage: independent of the micro-batch, proportional to it, or to the autoencoder's chunk."""


class Storage(NamedTuple):
    """A storage of the device."""

    size: int
    phase: str
    part: str
    frames: int
    """Frames that the autoencoder encodes at once, 0 for another storage."""
    frames_per_clip: int


class Cost(NamedTuple):
    """Operation with its cost at the micro-batch size of the run."""

    phase: str
    kind: str
    flops: float
    bytes: float
    """Bytes that scale with the micro-batch, or with the chunk."""
    constant_bytes: float
    frames: int
    frames_per_clip: int


class Event(NamedTuple):
    """Allocation or release of a storage."""

    storage: int
    """Index of the storage; its complement (~index) for a release."""
    phase: str
    module: str
