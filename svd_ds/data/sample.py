"""Types of an index's contents, and the one place where each value is checked.

An index may come from an untrusted source, or from a disk that failed. Every value is checked when it is
read: a wrong header is refused, and a wrong line makes only its sample unreadable. Every parser of an index
line, of any format, calls `parse_sample`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from svd_ds.data.motion import MAX_BUCKET, MotionMap
from svd_ds.pixels.still import MAX_PIXELS
from svd_ds.scalars import SAMPLE_FIELDS
from svd_ds.small_files import is_number

FORMAT = "svd_ds shards"
VERSION = 1
MEDIA = ("mp4", "jpg", "mov", "mkv", "webm", "avi", "m4v", "jpeg", "png", "webp")
"""Extensions of a sample's pixels. Our shards have the first two: a video, or an image as a clip of one
frame. External shards may have the others."""
STILLS = ("jpg", "jpeg", "png", "webp")
"""Extensions of images."""
ID = re.compile(r"[\w-]+")
EXTENSION = re.compile(r"\w[\w.-]*")
TEXTS = ("json", "txt")
MAX_TEXT = 2**24
"""Largest caption or json of a sample, in bytes."""
TAR_BLOCK = 512
"""Block size of a tar in bytes: members begin at multiples of it, after a header of that size."""
MAX_SIDE = 65_535
MAX_FRAMES = 2**31
MAX_BYTES = 2**62
MAX_RATE = 1e6
"""Largest frame rate: finite in every float type that the value is stored in."""
MAX_SCORE = 1e6


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    num_bytes: int
    num_samples: int


@dataclass(frozen=True)
class Sample:
    """One sample, as the index describes it."""

    id: str
    shard: int
    """Number of the shard, counted through the header's list."""
    members: dict[str, tuple[int, int]]
    """Extension -> (offset, size) of its bytes in the shard."""
    num_frames: int
    fps: float
    height: int
    width: int
    motion: float
    """See `flow.motion_score`."""
    scalars: dict[str, float] = field(default_factory=dict)
    """Field of a scalar condition (svd_ds/scalars.py) -> number, for those that the sample has."""
    annotations: dict[str, float] = field(default_factory=dict)
    """Further numbers in the sample's json, by name: text_area, aesthetic, ..."""

    @staticmethod
    def from_metadata(
        sample_id: str, shard: int, members: dict[str, tuple[int, int]], metadata: Mapping[str, Any]
    ) -> Sample:
        """Build the index entry of a sample from its JSON in the shard, `metadata`."""
        return Sample(
            id=sample_id,
            shard=shard,
            members=members,
            **{name: metadata[name] for name in NUMBERS},
            scalars={name: metadata[name] for name in SAMPLE_FIELDS if metadata.get(name) is not None},
            annotations=metadata.get("annotations", {}),
        )

    @property
    def media(self) -> str:
        """Extension of the sample's pixels."""
        return next(name for name in MEDIA if name in self.members)

    def number(self, name: str) -> float | None:
        """Return the sample's field, scalar or annotation `name`; None if it has none."""
        if name in NUMBERS:
            return getattr(self, name)
        return self.scalars.get(name, self.annotations.get(name))

    def as_row(self) -> dict[str, Any]:
        """Return the fields as an index line has them, without empty ones; `parse_sample` reads them."""
        row = {name: getattr(self, name) for name in REQUIRED_FIELDS} | self.scalars
        return row | ({"annotations": self.annotations} if self.annotations else {})


NUMBERS = ("motion", "num_frames", "fps", "height", "width")
"""Numbers that every sample has."""
REQUIRED_FIELDS = tuple(
    name for name in Sample.__dataclass_fields__ if name not in ("scalars", "annotations")
)


def parse_sample(fields: Any, shards: Sequence[Shard] | None = None, shard: int | None = None) -> Sample:
    """Check a sample's fields, as JSON has them, and build a `Sample`.

    Annotations that are not finite numbers are left out: the sample lacks them.

    Args:
        shards: shards of the index, within which the members must lie; None: their sizes are not known yet.
        shard: number of the shard to which the line belongs.

    Raises:
        ValueError: a value that no sample can have; the message names the field.
    """
    _check_keys(fields, set(REQUIRED_FIELDS), {"annotations", *SAMPLE_FIELDS})
    sample = Sample(
        id=_parse_id(fields["id"]),
        shard=_check_int("shard", fields["shard"], 0, MAX_FRAMES if shards is None else len(shards) - 1),
        members=_parse_members(fields["members"]),
        num_frames=_check_int("num_frames", fields["num_frames"], 1, MAX_FRAMES),
        fps=_check_number("fps", fields["fps"], 0, MAX_RATE),
        height=_check_int("height", fields["height"], 1, MAX_SIDE),
        width=_check_int("width", fields["width"], 1, MAX_SIDE),
        motion=_check_number("motion", fields["motion"], 0, MAX_SCORE),
        scalars={
            name: _check_number(name, fields[name], scalar.low, scalar.high)
            for name, scalar in SAMPLE_FIELDS.items()
            if fields.get(name) is not None
        },
        annotations=_parse_annotations(fields.get("annotations")),
    )
    if not sample.fps:
        raise ValueError("fps is 0: it must be above 0")
    if sample.height * sample.width > MAX_PIXELS:
        raise ValueError(
            f"height x width is {sample.height} x {sample.width}: it must be at most {MAX_PIXELS} pixels"
        )
    if shard is not None and sample.shard != shard:
        raise ValueError(f"shard is {sample.shard}, but its line in the index belongs to shard {shard}")
    if shards is not None:
        end, num_bytes = (
            max(offset + size for offset, size in sample.members.values()),
            shards[sample.shard].num_bytes,
        )
        if end > num_bytes:
            raise ValueError(
                f"members end at byte {end}, but shard {shards[sample.shard].name} has {num_bytes} bytes"
            )
    return sample


def parse_header(header: Any, check_name: Callable[[str], None]) -> tuple[tuple[Shard, ...], MotionMap]:
    """Check an index's header, as JSON has it.

    Args:
        check_name: raises ValueError for the name of a shard that must not be opened.

    Returns:
        The shards and the motion map.

    Raises:
        ValueError: the header is damaged or has another version.
    """
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"does not begin with the header of an index of {FORMAT}")
    version = header.get("version")
    if isinstance(version, bool) or version != VERSION:
        raise ValueError(f"has format version {_format(version)}; this program reads {VERSION}")
    try:
        _check_keys(header, {"format", "version", "motion_map", "shards"}, set())
        if not isinstance(header["shards"], list) or not header["shards"]:
            raise ValueError("lists no shards")
        shards = tuple(_parse_shard(fields, check_name) for fields in header["shards"])
        name, times = Counter(shard.name for shard in shards).most_common(1)[0]
        if times > 1:
            raise ValueError(f"lists shard {_format(name)} {times} times")
        return shards, _parse_motion_map(header["motion_map"])
    except ValueError as error:
        raise ValueError(f"has a header that is damaged: {error}") from error


def check_local_name(name: Any) -> None:
    """Check that a file name of an index is inside the folder that it is relative to.

    Raises:
        ValueError: it is outside, or is not a file name.
    """
    if (
        not isinstance(name, str)
        or not name
        or any(ord(letter) < 32 or ord(letter) == 127 for letter in name)
    ):
        raise ValueError(f"shard name {_format(name)} is not a file name")
    if name.startswith("/") or {"", ".", ".."} & set(name.split("/")):
        raise ValueError(
            f"shard name {_format(name)} leads out of the folder of the index, or is not a file name"
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"shard name {_format(name)} is not UTF-8") from None


def _check_keys(fields: Any, required: set[str], optional: set[str]) -> None:
    if not isinstance(fields, dict):
        raise ValueError(f"it is {_format(fields)}: it must be a JSON object")
    if not fields.keys() >= required:
        raise ValueError(f"it has no {min(required - fields.keys())}")
    if len(fields) > len(required) and (unknown := fields.keys() - required - optional):
        raise ValueError(
            f"it has a field {_format(min(unknown))}, which this version of svd_ds does not know: a newer "
            "one wrote it, or its scalar is not registered (svd_ds/scalars.py)"
        )


def _parse_shard(fields: Any, check_name: Callable[[str], None]) -> Shard:
    _check_keys(fields, {"name", "num_bytes", "num_samples"}, set())
    check_local_name(fields["name"])
    check_name(fields["name"])
    num_bytes = _check_int("num_bytes", fields["num_bytes"], 0, MAX_BYTES)
    num_samples = _check_int("num_samples", fields["num_samples"], 0, MAX_BYTES)
    return Shard(fields["name"], num_bytes, num_samples)


def _parse_motion_map(fields: Any) -> MotionMap:
    _check_keys(fields, set(asdict(MotionMap((), ()))), set())
    if not all(isinstance(values, list) and values for values in fields.values()):
        raise ValueError(f"motion_map is {_format(fields)}: it must hold lists of numbers")
    scores = tuple(_check_number("motion_map.scores", score, 0, MAX_SCORE) for score in fields["scores"])
    buckets = tuple(_check_number("motion_map.buckets", b, 0, MAX_BUCKET) for b in fields["buckets"])
    ascending = list(scores) == sorted(set(scores)) and list(buckets) == sorted(buckets)
    if len(scores) != len(buckets) or not scores[0] > 0 or not ascending:
        raise ValueError("motion_map must have as many buckets as scores, both ascending, scores above 0")
    return MotionMap(scores, buckets)


def _parse_id(value: Any) -> str:
    if not isinstance(value, str) or not ID.fullmatch(value):
        raise ValueError(f"id is {_format(value)}: it must consist of letters, digits, _ and -")
    return value


def _parse_members(value: Any) -> dict[str, tuple[int, int]]:
    if not isinstance(value, dict) or not all(map(EXTENSION.fullmatch, value)):
        raise ValueError(f"members is {_format(value)}: it must map extensions to [offset, size]")
    if value.keys().isdisjoint(MEDIA):
        raise ValueError(f"members has no video or image, but {', '.join(value) or 'nothing'}")
    members = {}
    for name, span in value.items():
        if not isinstance(span, list | tuple) or len(span) != 2:
            raise ValueError(f"members.{name} is {_format(span)}: it must be [offset, size]")
        offset, size = span
        if type(offset) is not int or offset % TAR_BLOCK or not TAR_BLOCK <= offset <= MAX_BYTES:
            raise ValueError(
                f"members.{name}[0] is {_format(offset)}: it must be a tar offset, a multiple of {TAR_BLOCK}"
            )
        if type(size) is not int or not 0 <= size <= MAX_BYTES:
            raise ValueError(f"members.{name}[1] is {_format(size)}: it must be a number of bytes")
        if name in TEXTS and size > MAX_TEXT:
            raise ValueError(f"members.{name}[1] is {size} bytes: it must be at most {MAX_TEXT}")
        members[name] = (offset, size)
    return members


def _parse_annotations(value: Any) -> dict[str, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"annotations is {_format(value)}: it must map names to numbers")
    return {name: number for name, number in value.items() if is_number(number)}


def _check_int(name: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {_format(value)}: it must be an integer from {low} to {high}")
    return value


def _check_number(name: str, value: Any, low: float, high: float) -> float:
    # NaN is in no range.
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"{name} is {_format(value)}: it must be a number from {low:g} to {high:g}")
    return value


def _format(value: Any) -> str:
    """Format a value for an error message: short, and printable on any terminal."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # An integer of more digits than Python prints.
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
