"""Shards and their index, as docs/data.md fixes them: checked when loaded. writer.py writes them.

An index of any size costs eight bytes a sample in memory: a line is parsed when its sample is asked for, so a
loader's worker processes start at once and share the file through the page cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from svd_ds.data.folders import INDEX_NAME, Folder
from svd_ds.data.motion import MotionMap
from svd_ds.data.quarantine import Fault, Quarantine
from svd_ds.data.sample import TAR_BLOCK, Sample, Shard, parse_header, parse_sample


class ReadMember(Protocol):
    """Reads a member of a sample, or a part of it: see `Index.open`."""

    def __call__(self, member: str, begin: int = 0, number: int | None = None) -> bytes: ...


@dataclass(frozen=True)
class Index:
    """The samples of a folder of shards, or those of them that were kept."""

    folder: Folder
    path: Path
    """Of the index file."""
    num_bytes: int
    """Its size when it was loaded."""
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

        Raises:
            FileNotFoundError: the folder, its index or a shard is missing.
            ValueError: the index is cut short, damaged or not ours, or a shard's size is not the one in it.
        """
        if not isinstance(folder, Folder):
            folder = Folder(Path(folder))
        path, name = folder.index(), folder.name(INDEX_NAME)
        content = path.read_bytes()
        try:
            header = _json(content[: content.find(b"\n") + 1])
        except ValueError:
            header = None
        try:
            shards, motion_map = parse_header(header, folder.check_name)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error
        line_ends = np.flatnonzero(np.frombuffer(content, dtype=np.uint8) == ord("\n"))
        expected = sum(shard.num_samples for shard in shards)
        if len(line_ends) - 1 != expected:
            raise ValueError(f"{name} is cut short: it lists {len(line_ends) - 1} of its {expected} samples")
        folder.check_shards(shards)
        return Index(
            folder=folder,
            path=path,
            num_bytes=len(content),
            shards=shards,
            shard_sizes=tuple(shard.num_samples for shard in shards),
            line_offsets=line_ends[:-1] + 1,
            motion_map=motion_map,
            fingerprint=hashlib.sha256(content).hexdigest()[:16],
        )

    def __len__(self) -> int:
        return len(self.line_offsets)

    def samples(self) -> Iterator[Sample]:
        """All samples, in the order of their numbers.

        Raises:
            ValueError: a line is damaged; the message names the index and the line. `drop_damaged` sets such
                samples aside.
        """
        for number, sample in enumerate(self._parsed()):
            yield self._sound(number, sample)

    def sample(self, number: int) -> Sample:
        """Sample `number`, counted through the shards in turn. Raises ValueError as `samples` does."""
        with self._open_index() as file:
            file.seek(int(self.line_offsets[number]))
            return self._sound(number, self._parse(file.readline(), self._shard_number(number)))

    def drop_damaged(self, quarantine: Quarantine) -> tuple[Index, list[Fault]]:
        """The index of the samples whose lines are sound and whose ids are unique, and the others' faults.

        Raises:
            ValueError: more are not than `quarantine` allows.
        """
        sound = np.ones(len(self), dtype=bool)
        hashes = np.empty(len(self), dtype=np.int64)
        faults: list[Fault] = []

        def refuse(number: int, name: str, cause: str) -> None:
            sound[number] = False
            line = f"line {self._line_number(number)}"
            fault = Fault(f"{name} ({line})" if name else line, self.folder.name(INDEX_NAME), cause)
            quarantine.add([fault])
            faults.append(fault)

        for number, sample in enumerate(self._parsed()):
            hashes[number] = number if isinstance(sample, ValueError) else hash(sample.id)
            if isinstance(sample, ValueError):
                refuse(number, "", str(sample))
        seen: dict[str, int] = {}
        values, times = np.unique(hashes[sound], return_counts=True)
        if (times > 1).any():
            shared = np.isin(hashes, values[times > 1]) & sound
            for number in np.flatnonzero(shared).tolist():
                sample_id = self.sample(number).id
                if sample_id in seen:
                    first = self._line_number(seen[sample_id])
                    refuse(number, sample_id, f"line {first} has the same id")
                seen.setdefault(sample_id, number)
        return self._part(sound), faults

    def _parsed(self) -> Iterator[Sample | ValueError]:
        """Each line's sample, or what is wrong with it."""
        shard_of = np.repeat(np.arange(len(self.shards)), self.shard_sizes)
        with self._open_index() as file:
            position = 0
            for offset, shard in zip(self.line_offsets.tolist(), shard_of.tolist(), strict=True):
                if offset != position:  # A seek gives up what is buffered.
                    file.seek(offset)
                line = file.readline()
                position = offset + len(line)
                yield self._parse(line, shard)

    @contextmanager
    def _open_index(self) -> Iterator[IO[bytes]]:
        """Raises ValueError where it is another index than the one that was loaded."""
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size != self.num_bytes:
                raise ValueError(f"{self.folder.name(INDEX_NAME)} was changed after it was read: start again")
            yield file

    def _parse(self, line: bytes, shard: int) -> Sample | ValueError:
        try:
            return parse_sample(_json(line), self.shards, shard)
        except ValueError as error:
            return error

    def _sound(self, number: int, sample: Sample | ValueError) -> Sample:
        if isinstance(sample, ValueError):
            line, name = self._line_number(number), self.folder.name(INDEX_NAME)
            raise ValueError(f"line {line} of {name} is damaged: {sample}")
        return sample

    def _line_number(self, number: int) -> int:
        """The line of sample `number` in the index file, the first being 1."""
        with open(self.path, "rb") as file:
            return file.read(int(self.line_offsets[number])).count(b"\n") + 1

    def _shard_number(self, number: int) -> int:
        return int(np.searchsorted(np.cumsum(self.shard_sizes), number, side="right"))

    def shard_location(self, number: int) -> str:
        """The path or URL of the shard that holds sample `number`."""
        return self.folder.name(self.shards[self._shard_number(number)].name)

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

        It raises ValueError where the sample has no such member, or not so many bytes of it, or where the
        shard has another sample's at the place that the index gives.
        """
        shard = self.shards[sample.shard]
        path = self.folder.name(shard.name)
        keys: dict[str, str] = {}
        with self.folder.open(shard) as file:

            def read(member: str, begin: int = 0, number: int | None = None) -> bytes:
                if member not in sample.members:
                    raise ValueError(f"it has no .{member}")
                offset, size = sample.members[member]
                number = size - begin if number is None else number
                if member not in keys:
                    keys[member] = _key(_read(file, offset - TAR_BLOCK, TAR_BLOCK))
                    _check_key(sample, member, keys)
                content = _read(file, offset + begin, min(number, size - begin))
                if len(content) != number:
                    raise ValueError(
                        f"{path} holds {len(content)} of the {number} bytes of {sample.id}.{member}"
                    )
                return content

            yield read


def _read(file: IO[bytes], begin: int, number: int) -> bytes:
    """As many of the bytes as there are."""
    file.seek(begin)
    content = file.read(number)
    while len(content) < number and (more := file.read(number - len(content))):
        content += more
    return content


def _json(line: bytes) -> object:
    """Raises ValueError where the line is no JSON."""
    try:
        return json.loads(line)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"it is no JSON ({error})") from error


def _key(header: bytes) -> str:
    """The key of a tar member, from its header block: its file name up to the first dot. Empty where the
    header does not hold the name as it is: a long one, or in a pax tar one that is not ASCII."""
    name = header[:100].rstrip(b"\0")
    if len(header) < TAR_BLOCK or len(name) == 100 or b"\0" in name or not name.isascii() or b"?" in name:
        return ""
    return name.decode("ascii").rpartition("/")[2].split(".", 1)[0]


def _check_key(sample: Sample, member: str, keys: dict[str, str]) -> None:
    """Check that the members of a sample are not those of different samples.

    An id is the key, or ends with it (external shards), in which letters that an id cannot have are `_`.

    Raises:
        ValueError: the index gives the place of another sample's member.
    """
    key = keys[member]
    if key and (re.sub(r"[^\w-]+", "_", key) not in sample.id or len(set(keys.values()) - {""}) > 1):
        raise ValueError(f"its .{member} is where the shard has that of sample {key}: the index is wrong")
