"""Shards and their index, as docs/data.md fixes them: checked when loaded. writer.py writes them.

An index of any size costs eight bytes a sample in memory: a line is parsed when its sample is asked for, so a
loader's worker processes start at once and share the file through the page cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from svd_ds.data.motion import MotionMap

INDEX_NAME = "index.jsonl"
FORMAT = "svd_ds shards"
VERSION = 1
MEDIA = ("mp4", "jpg", "mov", "mkv", "webm", "avi", "m4v", "jpeg", "png", "webp")
"""Extensions of a sample's pixels. Ours are the first two, a clip, and a still image as a clip of one frame;
foreign shards may have the others."""


STILLS = ("jpg", "jpeg", "png", "webp")
"""Those of them that are images."""


class ReadMember(Protocol):
    """Reads a member of a sample, or a part of it: see `Index.open`."""

    def __call__(self, member: str, begin: int = 0, number: int | None = None) -> bytes: ...


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


@dataclass(frozen=True)
class Folder:
    """A data set's files, on a file system that is mounted here. loader.py has those that are fetched."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def name(self, file: str) -> str:
        """A file's path, or URL, as errors name it."""
        return f"{self}/{file}"

    def file(self, name: str, num_bytes: int | None = None) -> Path:
        """A file's local path, of a shard of `num_bytes`. OSError or ValueError where it cannot be had."""
        return self.path / name

    def check_index(self) -> None:
        """Raises FileNotFoundError where there is none."""
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no data folder {self}; tools/make_shards.py makes one")
        if not (self.path / INDEX_NAME).is_file():
            raise FileNotFoundError(f"{self} has no {INDEX_NAME}; tools/make_shards.py writes it at its end")

    def check_shards(self, shards: Iterable[Shard]) -> None:
        """Raises FileNotFoundError or ValueError where one is missing or cut short."""
        for shard in shards:
            _check_shard(self.path / shard.name, shard.num_bytes)


@dataclass(frozen=True)
class Index:
    """The samples of a folder of shards, or those of them that were kept."""

    folder: Folder
    shards: tuple[Shard, ...]
    shard_sizes: tuple[int, ...]
    """Kept samples of each shard."""
    line_offsets: np.ndarray
    """int64, (num_samples,): where each kept sample's line begins in the index."""
    motion_map: MotionMap
    fingerprint: str
    """16 hexadecimal digits that name this set: a hash of the index's bytes and of the choice among them."""

    @staticmethod
    def load(folder: str | Path | Folder) -> Index:
        """Read the index of `folder` and check that every shard is there in full.

        Raises FileNotFoundError or ValueError, in one sentence, for a missing folder, index or shard, an
        index that is cut short or not ours, a shard whose size is not the one in the index.
        """
        if not isinstance(folder, Folder):
            folder = Folder(Path(folder))
        folder.check_index()
        path = folder.name(INDEX_NAME)
        content = folder.file(INDEX_NAME).read_bytes()
        header = _parse_header(path, content)
        shards = tuple(Shard(**shard) for shard in header["shards"])
        line_ends = np.flatnonzero(np.frombuffer(content, dtype=np.uint8) == ord("\n"))
        expected = sum(shard.num_samples for shard in shards)
        if len(line_ends) - 1 != expected:
            raise ValueError(f"{path} is cut short: it lists {len(line_ends) - 1} of its {expected} samples")
        folder.check_shards(shards)
        return Index(
            folder=folder,
            shards=shards,
            shard_sizes=tuple(shard.num_samples for shard in shards),
            line_offsets=line_ends[:-1] + 1,
            motion_map=MotionMap(**{name: tuple(values) for name, values in header["motion_map"].items()}),
            fingerprint=hashlib.sha256(content).hexdigest()[:16],
        )

    def __len__(self) -> int:
        return len(self.line_offsets)

    def samples(self) -> Iterator[Sample]:
        """All samples, in the order of their numbers."""
        with open(self.folder.file(INDEX_NAME), "rb") as file:
            for offset in self.line_offsets:
                file.seek(int(offset))
                yield parse_sample(json.loads(file.readline()))

    def sample(self, number: int) -> Sample:
        """Sample `number`, counted through the shards in turn."""
        return next(replace(self, line_offsets=self.line_offsets[number : number + 1]).samples())

    def shard_of(self, number: int) -> str:
        """The path or URL of the shard that holds sample `number`."""
        shard = int(np.searchsorted(np.cumsum(self.shard_sizes), number, side="right"))
        return self.folder.name(self.shards[shard].name)

    def keep(self, wanted: Callable[[Sample], bool]) -> Index:
        """The index of the samples that `wanted` accepts, in the same order."""
        return self.split(lambda sample: 0 if wanted(sample) else None, 1)[0]

    def split(self, choose: Callable[[Sample], int | None], parts: int) -> list[Index]:
        """The indices of the samples for which `choose` gives 0, 1, ...; None leaves a sample out."""
        given = (choose(sample) for sample in self.samples())
        part_of_sample = np.fromiter((-1 if p is None else p for p in given), dtype=np.int64, count=len(self))
        return [self._part(part_of_sample == part) for part in range(parts)]

    def _part(self, kept: np.ndarray) -> Index:
        if kept.all():
            return self
        shard_of_sample = np.repeat(np.arange(len(self.shards)), self.shard_sizes)
        sizes = np.bincount(shard_of_sample[kept], minlength=len(self.shards))
        choice = self.fingerprint.encode() + np.packbits(kept).tobytes()
        return replace(
            self,
            shard_sizes=tuple(int(size) for size in sizes),
            line_offsets=self.line_offsets[kept],
            fingerprint=hashlib.sha256(choice).hexdigest()[:16],
        )

    def read(self, sample: Sample, member: str) -> bytes:
        """The bytes of a sample's member. Raises ValueError where the shard ends before them."""
        with self.open(sample) as read:
            return read(member)

    @contextmanager
    def open(self, sample: Sample) -> Iterator[ReadMember]:
        """What reads a sample's members, or parts of them: (member, first byte, number of bytes).

        It raises ValueError where the sample has no such member, or not so many bytes of it.
        """
        shard = self.shards[sample.shard]
        # Unbuffered: what is read lies scattered, and each part is wanted whole.
        with open(self.folder.file(shard.name, shard.num_bytes), "rb", buffering=0) as file:

            def read(member: str, begin: int = 0, number: int | None = None) -> bytes:
                if member not in sample.members:
                    raise ValueError(f"it has no .{member}")
                offset, size = sample.members[member]
                number = size - begin if number is None else number
                file.seek(offset + begin)
                content = file.read(min(number, size - begin))
                while len(content) < number and (more := file.read(min(number, size - begin) - len(content))):
                    content += more
                if len(content) != number:
                    path = self.folder.name(shard.name)
                    raise ValueError(
                        f"{path} holds {len(content)} of the {number} bytes of {sample.id}.{member}"
                    )
                return content

            yield read


def _parse_header(path: str, content: bytes) -> dict[str, Any]:
    try:
        header = json.loads(content[: content.find(b"\n") + 1])
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} does not begin with the header of an index of {FORMAT}")
    if header["version"] != VERSION:
        raise ValueError(f"{path} has format version {header['version']}; this program reads {VERSION}")
    return header


def parse_sample(fields: dict[str, Any]) -> Sample:
    """A sample from its line in the index, as json reads it."""
    members = {name: tuple(span) for name, span in fields["members"].items()}
    return Sample(**{**fields, "members": members})


def _check_shard(path: Path, num_bytes: int) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"shard {path} is missing, though the index beside it lists it")
    actual = path.stat().st_size
    if actual != num_bytes:
        cause = "it is truncated" if actual < num_bytes else "it is not the file that was indexed"
        raise ValueError(f"shard {path} has {actual} bytes where its index says {num_bytes}: {cause}")
