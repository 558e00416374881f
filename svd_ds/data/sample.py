"""What an index says of a data set: the types, and the one place where each value is checked.

An index may come from a stranger, or from a disk that failed. Every value is checked where it is read: a
header that is wrong is refused, a sample that is wrong is one unreadable sample. Whoever parses an index
line, of whatever format, calls `parse_sample`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from svd_ds.data.motion import MAX_BUCKET, MotionMap
from svd_ds.pixels.still import MAX_PIXELS
from svd_ds.small_files import is_number

FORMAT = "svd_ds shards"
VERSION = 1
MEDIA = ("mp4", "jpg", "mov", "mkv", "webm", "avi", "m4v", "jpeg", "png", "webp")
"""Extensions of a sample's pixels. Ours are the first two, a clip, and a still image as a clip of one frame;
foreign shards may have the others."""
STILLS = ("jpg", "jpeg", "png", "webp")
"""Those of them that are images."""
ID = re.compile(r"[\w-]+")
EXTENSION = re.compile(r"\w[\w.-]*")
TEXTS = ("json", "txt")
MAX_TEXT = 2**24
"""Bytes of a caption, or of a sample's json."""
TAR_BLOCK = 512
"""Bytes: a tar's members begin at multiples of it, after a header of that size."""
MAX_SIDE = 65_535
MAX_FRAMES = 2**31
MAX_BYTES = 2**62
MAX_RATE = 1e6
"""Frames a second: finite in every float type that the value goes through."""
MAX_SCORE = 1e6


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    num_bytes: int
    num_samples: int


@dataclass(frozen=True)
class Sample:
    """What the index knows of one sample."""

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
    elevation: float | None = None
    """Of the camera, in degrees, where the sample says it."""
    annotations: dict[str, float] = field(default_factory=dict)
    """Further numbers that the sample's json gives, by name: text_area, aesthetic, ..."""

    @property
    def media(self) -> str:
        """The extension of the sample's pixels."""
        return next(name for name in MEDIA if name in self.members)


OPTIONAL = {"elevation", "annotations"}
REQUIRED = Sample.__dataclass_fields__.keys() - OPTIONAL


def parse_sample(fields: Any, shards: Sequence[Shard] | None = None, shard: int | None = None) -> Sample:
    """Check a sample's fields, as JSON has them, and make a `Sample` of them.

    Annotations that are no finite number are left out: the sample lacks them.

    Args:
        shards: of the index, within which the members must lie; None: their sizes are not known yet.
        shard: number of the shard that the sample's place in the index belongs to.

    Raises:
        ValueError: a value that no sample can have; the message names the field.
    """
    _check_keys(fields, REQUIRED, OPTIONAL)
    sample = Sample(
        id=_id(fields["id"]),
        shard=_integer("shard", fields["shard"], 0, MAX_FRAMES if shards is None else len(shards) - 1),
        members=_members(fields["members"]),
        num_frames=_integer("num_frames", fields["num_frames"], 1, MAX_FRAMES),
        fps=_number("fps", fields["fps"], 0, MAX_RATE),
        height=_integer("height", fields["height"], 1, MAX_SIDE),
        width=_integer("width", fields["width"], 1, MAX_SIDE),
        motion=_number("motion", fields["motion"], 0, MAX_SCORE),
        elevation=None
        if fields.get("elevation") is None
        else _number("elevation", fields["elevation"], -90, 90),
        annotations=_annotations(fields.get("annotations")),
    )
    if not sample.fps:
        raise ValueError("fps is 0, and must be above 0")
    if sample.height * sample.width > MAX_PIXELS:
        raise ValueError(
            f"height x width is {sample.height} x {sample.width}, and a frame may have {MAX_PIXELS} pixels"
        )
    if shard is not None and sample.shard != shard:
        raise ValueError(f"shard is {sample.shard}, and its place in the index is in shard {shard}")
    if shards is not None:
        end, num_bytes = (
            max(offset + size for offset, size in sample.members.values()),
            shards[sample.shard].num_bytes,
        )
        if end > num_bytes:
            raise ValueError(
                f"members end at byte {end}, and shard {shards[sample.shard].name} has {num_bytes} bytes"
            )
    return sample


def parse_header(header: Any, check_name: Callable[[str], None]) -> tuple[tuple[Shard, ...], MotionMap]:
    """Check an index's header, as JSON has it.

    Args:
        check_name: raises ValueError for the name of a shard that must not be opened.

    Raises:
        ValueError: it is no header of this version; the message says why.
    """
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"does not begin with the header of an index of {FORMAT}")
    version = header.get("version")
    if isinstance(version, bool) or version != VERSION:
        raise ValueError(f"has format version {_shown(version)}; this program reads {VERSION}")
    try:
        _check_keys(header, {"format", "version", "motion_map", "shards"}, set())
        if not isinstance(header["shards"], list) or not header["shards"]:
            raise ValueError("lists no shards")
        shards = tuple(_shard(fields, check_name) for fields in header["shards"])
        name, times = Counter(shard.name for shard in shards).most_common(1)[0]
        if times > 1:
            raise ValueError(f"lists shard {_shown(name)} {times} times")
        return shards, _motion_map(header["motion_map"])
    except ValueError as error:
        raise ValueError(f"has a header that is damaged: {error}") from error


def check_local_name(name: Any) -> None:
    """Check that a file's name, which an index gives, lies within the folder that it is relative to.

    Raises:
        ValueError: it does not, or is no file name.
    """
    if (
        not isinstance(name, str)
        or not name
        or any(ord(letter) < 32 or ord(letter) == 127 for letter in name)
    ):
        raise ValueError(f"shard name {_shown(name)} is no file name")
    if name.startswith("/") or {"", ".", ".."} & set(name.split("/")):
        raise ValueError(
            f"shard name {_shown(name)} leads out of the folder of the index, or is no file name"
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"shard name {_shown(name)} is no UTF-8") from None


def _check_keys(fields: Any, required: set[str], optional: set[str]) -> None:
    if not isinstance(fields, dict):
        raise ValueError(f"it is {_shown(fields)}, and must be a JSON object")
    if not fields.keys() >= required:
        raise ValueError(f"it has no {min(required - fields.keys())}")
    if len(fields) > len(required) and (unknown := fields.keys() - required - optional):
        raise ValueError(
            f"it has a field {_shown(min(unknown))}, which this version of svd_ds does not know: a newer one "
            "wrote it"
        )


def _shard(fields: Any, check_name: Callable[[str], None]) -> Shard:
    _check_keys(fields, {"name", "num_bytes", "num_samples"}, set())
    check_local_name(fields["name"])
    check_name(fields["name"])
    num_bytes = _integer("num_bytes", fields["num_bytes"], 0, MAX_BYTES)
    return Shard(fields["name"], num_bytes, _integer("num_samples", fields["num_samples"], 0, MAX_BYTES))


def _motion_map(fields: Any) -> MotionMap:
    _check_keys(fields, set(asdict(MotionMap((), ()))), set())
    if not all(isinstance(values, list) and values for values in fields.values()):
        raise ValueError(f"motion_map is {_shown(fields)}, and must hold lists of numbers")
    scores = tuple(_number("motion_map.scores", score, 0, MAX_SCORE) for score in fields["scores"])
    buckets = tuple(_number("motion_map.buckets", bucket, 0, MAX_BUCKET) for bucket in fields["buckets"])
    ascending = list(scores) == sorted(set(scores)) and list(buckets) == sorted(buckets)
    if len(scores) != len(buckets) or not scores[0] > 0 or not ascending:
        raise ValueError("motion_map must have as many buckets as scores, both ascending, scores above 0")
    return MotionMap(scores, buckets)


def _id(value: Any) -> str:
    if not isinstance(value, str) or not ID.fullmatch(value):
        raise ValueError(f"id is {_shown(value)}, and must be of letters, digits, _ and -")
    return value


def _members(value: Any) -> dict[str, tuple[int, int]]:
    if not isinstance(value, dict) or not all(map(EXTENSION.fullmatch, value)):
        raise ValueError(f"members is {_shown(value)}, and must map extensions to [offset, size]")
    if value.keys().isdisjoint(MEDIA):
        raise ValueError(f"members has no video or image, but {', '.join(value) or 'nothing'}")
    members = {}
    for name, span in value.items():
        if not isinstance(span, list | tuple) or len(span) != 2:
            raise ValueError(f"members.{name} is {_shown(span)}, and must be [offset, size]")
        offset, size = span
        if type(offset) is not int or offset % TAR_BLOCK or not TAR_BLOCK <= offset <= MAX_BYTES:
            raise ValueError(
                f"members.{name}[0] is {_shown(offset)}, and must be a place in a tar: a multiple of "
                f"{TAR_BLOCK}"
            )
        if type(size) is not int or not 0 <= size <= MAX_BYTES:
            raise ValueError(f"members.{name}[1] is {_shown(size)}, and must be a number of bytes")
        if name in TEXTS and size > MAX_TEXT:
            raise ValueError(f"members.{name}[1] is {size}, and a text may have {MAX_TEXT} bytes")
        members[name] = (offset, size)
    return members


def _annotations(value: Any) -> dict[str, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"annotations is {_shown(value)}, and must map names to numbers")
    return {name: number for name, number in value.items() if is_number(number)}


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {_shown(value)}, and must be an integer from {low} to {high}")
    return value


def _number(name: str, value: Any, low: float, high: float) -> float:
    # NaN lies in no range.
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"{name} is {_shown(value)}, and must be a number from {low:g} to {high:g}")
    return value


def _shown(value: Any) -> str:
    """A value for an error message: short, and printable on any terminal."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # An integer of more digits than Python prints.
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
