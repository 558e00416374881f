"""Registry of scalar conditions: numbers that describe a clip, each embedded by the UNet.

A scalar condition is one entry here and one file conf/conditioning/NAME.yaml that names it:

    register(Scalar("azimuth", low=-180, high=180, unit="degrees", sample_field="azimuth"))

The index, the reader, the conditioner, the objectives, the sampler and tools/sample.py read this registry.
Append new entries: the order of registration numbers the draws that drop scalars (svd_ds/diffusion/draws.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

RESERVED_FIELDS = (
    *("id", "shard", "members", "num_frames", "fps", "height", "width", "motion", "scalars", "annotations"),
    *("captions", "source", "start_frame", "end_frame"),
)
"""Fields of a sample's json or index line that have another meaning."""
OTHER_SIGNALS = ("context", "concat")
"""Conditioning signals that are not scalars; they too are dropped at random."""


@dataclass(frozen=True)
class ClipProperties:
    """Properties of a clip that are known when it is read."""

    fps: float
    """Frames per second, after striding."""
    num_frames: int
    """Number of frames; 1 for a still image."""
    motion_bucket: float
    """Motion bucket, 0 to 255, from the motion score by the motion map of the run."""


@dataclass(frozen=True)
class Scalar:
    """A scalar condition, and where its value comes from.

    In training the value is a number of the sample (`sample_field`) or is computed from the clip (`compute`);
    with neither, the objective draws it.
    """

    name: str
    """Name in `conditioning.scalars`, `conditioning.drop_scalars` and `sampling.scalars`."""
    low: float
    """Smallest value that a sample may have or a video may be sampled with."""
    high: float
    """Largest value that a sample may have or a video may be sampled with."""
    unit: str = ""
    """Unit for error messages."""
    sample_field: str | None = None
    """Optional number of a sample's json and index line, or the name of an annotation."""
    sample_default: float | None = None
    """Value of samples that lack the field. None: a run that uses the scalar refuses such samples."""
    compute: Callable[[ClipProperties], float] | None = None
    """Function that computes the value from the clip."""
    sampling_default: float | None = None
    """Value with which videos are sampled unless `sampling` sets one. None: it must be set."""
    offset: float = 0.0
    """Number added to the value before it is embedded."""

    @property
    def is_drawn(self) -> bool:
        """True if the objective draws the value."""
        return self.sample_field is None and self.compute is None

    def check(self, value: float) -> str:
        """Describe what a value must be, as `settings.Range.check`; "" for a value in the range."""
        fits = math.isfinite(value) and self.low <= value <= self.high
        return "" if fits else f"at least {self.low:g} and at most {self.high:g}"


_scalars: dict[str, Scalar] = {}
_sample_fields: dict[str, Scalar] = {}
SCALARS: Mapping[str, Scalar] = MappingProxyType(_scalars)
"""Name -> registered scalar, in the order of registration; a live view."""
SAMPLE_FIELDS: Mapping[str, Scalar] = MappingProxyType(_sample_fields)
"""Sample field -> the scalar that reads it; a live view."""


def register(scalar: Scalar) -> Scalar:
    """Add a scalar condition to the registry.

    Raises:
        ValueError: the name or the sample field is taken or is not an identifier, the range is empty, a
            default is outside it, or the value has two origins.
    """
    field = scalar.sample_field
    if not scalar.name.isidentifier() or scalar.name in (*OTHER_SIGNALS, *_scalars):
        raise ValueError(
            f"a scalar cannot be named {scalar.name!r}: the name is taken or is not an identifier"
        )
    if field is not None and (not field.isidentifier() or field in (*RESERVED_FIELDS, *_sample_fields)):
        raise ValueError(f"scalar {scalar.name} cannot have the sample field {field!r}: it is taken")
    if field is not None and scalar.compute is not None:
        raise ValueError(f"scalar {scalar.name} has a sample field and is computed: choose one")
    if not scalar.low < scalar.high:
        raise ValueError(f"scalar {scalar.name} has low {scalar.low}: it must be below high, {scalar.high}")
    for default in (scalar.sample_default, scalar.sampling_default):
        if default is not None and (wrong := scalar.check(default)):
            raise ValueError(f"scalar {scalar.name} has the default {default}: it must be {wrong}")
    _scalars[scalar.name] = scalar
    if field is not None:
        _sample_fields[field] = scalar
    return scalar


def signal_names() -> tuple[str, ...]:
    """Return the names of the conditioning signals that can be dropped, in the order of their draws."""
    return (*OTHER_SIGNALS, *SCALARS)


def clip_scalars(clip: ClipProperties, read_field: Callable[[str], float | None]) -> dict[str, float]:
    """Compute the scalars of a clip, except those that the objective draws.

    Args:
        clip: properties of the clip.
        read_field: returns the value of a field or annotation of the clip's sample by name; None if it is
            missing.

    Returns:
        Name -> value; NaN if the sample lacks the number and the scalar has no default.
    """
    values = {}
    for name, scalar in SCALARS.items():
        if scalar.compute is not None:
            values[name] = scalar.compute(clip)
        elif scalar.sample_field is not None:
            number = read_field(scalar.sample_field)
            default = math.nan if scalar.sample_default is None else scalar.sample_default
            values[name] = default if number is None else number
    return values


# The public weights' scalars, in their order. Defaults for sampling: simple_video_sample.py of
# Stability-AI/generative-models, whose fps_id is 6.
FPS = register(
    Scalar("fps", low=0.01, high=1000, compute=lambda clip: clip.fps, sampling_default=7.0, offset=-1.0)
)
MOTION_BUCKET = register(
    Scalar("motion_bucket", low=0, high=255, compute=lambda clip: clip.motion_bucket, sampling_default=127.0)
)
# Sigma of the noise on the given frames (arXiv 2311.15127, D.4).
AUGMENTATION = register(Scalar("augmentation", low=0, high=1000, sampling_default=0.02))
RELEASED_SCALARS = (FPS.name, MOTION_BUCKET.name, AUGMENTATION.name)
"""Scalars of the public weights, in their order."""

# A camera that orbits an object (D.6), above the horizon. Default for sampling: SV3D's.
register(
    Scalar("elevation", low=-90, high=90, unit="degrees", sample_field="elevation", sampling_default=10.0)
)
