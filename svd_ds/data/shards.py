"""Reading of shards and their index, whose format is in docs/data.md. writer.py writes them.

An index takes eight bytes of memory a sample: a line is parsed when its sample is requested, so the worker
processes of a loader start quickly and share the file through the page cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from svd_ds.data.folders import INDEX_NAME, Folder
from svd_ds.data.members import ReadMember, member_reader
from svd_ds.data.motion import MotionMap
from svd_ds.data.quarantine import Fault, Quarantine
from svd_ds.data.sample import Sample, Shard, parse_header, parse_sample


@dataclass(frozen=True)
class Index:
    """Index of the samples of a folder of shards, or of a subset of them."""

    folder: Folder
    path: Path
    """Path of the index file."""
    num_bytes: int
    """Size of the index file when it was loaded."""
    shards: tuple[Shard, ...]
    shard_sizes: tuple[int, ...]
    """Number of samples of each shard that are in the subset."""
    line_offsets: np.ndarray
    """Offset in bytes of each sample's line in the index file: int64, (num_samples,)."""
    motion_map: MotionMap
    """Map from motion scores to motion buckets."""
    fingerprint: str
    """Hash of the index's bytes and of the choice of the subset, 16 hexadecimal digits."""

    @staticmethod
    def load(folder: str | Path | Folder) -> Index:
        """Read the index of a folder and check that every shard is complete.

        Raises:
            FileNotFoundError: the folder, its index or a shard is missing.
            ValueError: the index is cut short, damaged or of another format, or a shard has another size than
                the index says.
        """
        if not isinstance(folder, Folder):
            folder = Folder(Path(folder))
        path, name = folder.index_path(), folder.location(INDEX_NAME)
        content = path.read_bytes()
        try:
            header = _parse_json(content[: content.find(b"\n") + 1])
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
        """Iterate over all samples, in the order of their numbers.

        Raises:
            ValueError: a line is damaged; the message names the index and the line. `drop_damaged` leaves
                such samples out.
        """
        for number, sample in enumerate(self._parsed()):
            yield self._require_valid(number, sample)

    def sample(self, number: int) -> Sample:
        """Read a sample by its number, which counts through the shards in turn.

        Raises:
            ValueError: its line is damaged.
        """
        with self._open_index() as file:
            file.seek(int(self.line_offsets[number]))
            return self._require_valid(number, self._parse(file.readline(), self._shard_number(number)))

    def drop_damaged(self, quarantine: Quarantine) -> tuple[Index, list[Fault]]:
        """Return the index of the samples with valid lines and unique ids, and the faults of the others.

        Raises:
            ValueError: more samples are damaged than `quarantine` allows.
        """
        valid = np.ones(len(self), dtype=bool)
        hashes = np.empty(len(self), dtype=np.int64)
        faults: list[Fault] = []

        def refuse(number: int, name: str, cause: str) -> None:
            valid[number] = False
            line = f"line {self._line_number(number)}"
            fault = Fault(f"{name} ({line})" if name else line, self.folder.location(INDEX_NAME), cause)
            quarantine.add([fault])
            faults.append(fault)

        for number, sample in enumerate(self._parsed()):
            hashes[number] = number if isinstance(sample, ValueError) else hash(sample.id)
            if isinstance(sample, ValueError):
                refuse(number, "", str(sample))
        first_numbers: dict[str, int] = {}
        values, times = np.unique(hashes[valid], return_counts=True)
        if (times > 1).any():
            shared = np.isin(hashes, values[times > 1]) & valid
            for number in np.flatnonzero(shared).tolist():
                sample_id = self.sample(number).id
                if sample_id in first_numbers:
                    first = self._line_number(first_numbers[sample_id])
                    refuse(number, sample_id, f"line {first} has the same id")
                first_numbers.setdefault(sample_id, number)
        return self._subset(valid), faults

    def _parsed(self) -> Iterator[Sample | ValueError]:
        """Yield the sample of each line, or the error of a damaged line."""
        shard_numbers = np.repeat(np.arange(len(self.shards)), self.shard_sizes)
        with self._open_index() as file:
            end = 0
            for offset, shard in zip(self.line_offsets.tolist(), shard_numbers.tolist(), strict=True):
                if offset != end:  # A seek discards the buffer.
                    file.seek(offset)
                line = file.readline()
                end = offset + len(line)
                yield self._parse(line, shard)

    @contextmanager
    def _open_index(self) -> Iterator[IO[bytes]]:
        """Open the index file.

        Raises:
            ValueError: its size has changed since it was loaded.
        """
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size != self.num_bytes:
                raise ValueError(
                    f"{self.folder.location(INDEX_NAME)} was changed after it was read: restart the run"
                )
            yield file

    def _parse(self, line: bytes, shard: int) -> Sample | ValueError:
        """Parse the line of a sample of a shard; an error is returned."""
        try:
            return parse_sample(_parse_json(line), self.shards, shard)
        except ValueError as error:
            return error

    def _require_valid(self, number: int, sample: Sample | ValueError) -> Sample:
        """Return a parsed sample, or raise its error.

        Raises:
            ValueError: its line is damaged; the message names the index and the line.
        """
        if isinstance(sample, ValueError):
            line, name = self._line_number(number), self.folder.location(INDEX_NAME)
            raise ValueError(f"line {line} of {name} is damaged: {sample}")
        return sample

    def _line_number(self, number: int) -> int:
        """Return the line number of a sample in the index file, from 1."""
        with open(self.path, "rb") as file:
            return file.read(int(self.line_offsets[number])).count(b"\n") + 1

    def _shard_number(self, number: int) -> int:
        return int(np.searchsorted(np.cumsum(self.shard_sizes), number, side="right"))

    def shard_location(self, number: int) -> str:
        """Return the path or URL of the shard that holds a sample."""
        return self.folder.location(self.shards[self._shard_number(number)].name)

    def keep(self, wanted: Callable[[Sample], bool]) -> Index:
        """Return the index of the samples for which `wanted` is True, in the same order."""
        return self.split(lambda sample: 0 if wanted(sample) else None, 1)[0]

    def split(self, choose: Callable[[Sample], int | None], parts: int) -> list[Index]:
        """Split the samples into several indices.

        Args:
            choose: returns the number of the part of a sample, from 0; None leaves the sample out.
            parts: number of parts.
        """
        choices = (choose(sample) for sample in self.samples())
        part_numbers = np.fromiter((-1 if p is None else p for p in choices), dtype=np.int64, count=len(self))
        return [self._subset(part_numbers == part) for part in range(parts)]

    def _subset(self, kept: np.ndarray) -> Index:
        if kept.all():
            return self
        shard_numbers = np.repeat(np.arange(len(self.shards)), self.shard_sizes)
        sizes = np.bincount(shard_numbers[kept], minlength=len(self.shards))
        choice = self.fingerprint.encode() + np.packbits(kept).tobytes()
        return replace(
            self,
            shard_sizes=tuple(int(size) for size in sizes),
            line_offsets=self.line_offsets[kept],
            fingerprint=hashlib.sha256(choice).hexdigest()[:16],
        )

    def read(self, sample: Sample, member: str) -> bytes:
        """Read a member of a sample; see `open` and `ReadMember` for the errors."""
        with self.open(sample) as read:
            return read(member)

    @contextmanager
    def open(self, sample: Sample) -> Iterator[ReadMember]:
        """Open the shard of a sample; yields a reader of its members.

        Raises:
            OSError: the shard cannot be opened.
            ValueError: the shard is not the file that was indexed.
        """
        shard = self.shards[sample.shard]
        with self.folder.open(shard) as file:
            yield member_reader(file, sample, self.folder.location(shard.name))


def _parse_json(line: bytes) -> object:
    """Parse a line of JSON.

    Raises:
        ValueError: the line is not JSON.
    """
    try:
        return json.loads(line)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error})") from error
