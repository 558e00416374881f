"""Writing of shards and their index, whose format is in docs/data.md."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from svd_ds.data.folders import INDEX_NAME
from svd_ds.data.motion import MotionMap
from svd_ds.data.sample import FORMAT, VERSION, Sample, Shard
from svd_ds.fsync_io import replace_bytes


class ShardWriter:
    """Writer of samples to shards with an index; the same samples give the same bytes.

    A shard gets its name when it is complete, and the index is written after all shards: a folder with an
    index is complete.
    """

    def __init__(
        self,
        folder: str | Path,
        samples_per_shard: int = 16,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        """Create the folder.

        Args:
            folder: folder of the shards.
            samples_per_shard: number of samples of a shard.
            overwrite: remove the index and the shards that the folder has.
            resume: keep the shards of a writer that was not closed, for `adopt_shard`.

        Raises:
            ValueError: the folder has an index and `overwrite` is False, or `samples_per_shard` is below 1.
        """
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}: it must be at least 1")
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.shards: list[Shard] = []
        self.samples: list[Sample] = []
        self._ids: set[str] = set()
        self._open: list[tuple[str, dict[str, bytes]]] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        index = self.folder / INDEX_NAME
        if index.exists() and not overwrite:
            raise ValueError(
                f"{self.folder} already holds shards; choose another folder, or --overwrite them"
            )
        remove_shards(self.folder, "*.part" if resume else "*")

    def add(
        self,
        sample_id: str,
        media: str,
        content: bytes,
        metadata: Mapping[str, Any],
        extra_members: Mapping[str, bytes] | None = None,
    ) -> None:
        """Append a sample.

        Args:
            sample_id: id of letters, digits, `_` and `-`, unique in the data set.
            media: extension of `content`, "mp4" or "jpg".
            content: bytes of the video or image.
            metadata: content of the sample's JSON, with at least captions, num_frames, fps, height, width and
                motion (docs/data.md).
            extra_members: extension -> content of further members.

        Raises:
            ValueError: the id is invalid or repeats, or `metadata` cannot be written as JSON.
        """
        if not re.fullmatch(r"[\w-]+", sample_id):
            raise ValueError(f"sample id {sample_id!r} may hold only letters, digits, _ and -")
        if sample_id in self._ids:
            raise ValueError(f"two samples have the id {sample_id}")
        self._ids.add(sample_id)
        try:
            text = json.dumps(metadata, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
        except ValueError as error:
            raise ValueError(f"sample {sample_id} cannot be written: {error}") from error
        self._open.append((sample_id, {"json": text, media: content, **(extra_members or {})}))
        if len(self._open) == self.samples_per_shard:
            self.end_shard()

    def close(self, motion_map: MotionMap | None = None) -> MotionMap:
        """Write the last shard and the index.

        Args:
            motion_map: map to store in the index; None calibrates one on the samples.

        Returns:
            The stored motion map.
        """
        self.end_shard()
        if motion_map is None:
            motion_map = MotionMap.calibrate([clip.motion for clip in self.samples if clip.num_frames > 1])
        write_index(self.folder, self.shards, self.samples, motion_map)
        return motion_map

    def end_shard(self) -> None:
        """Write the samples added since the last shard as a shard, if there are any."""
        if not self._open:
            return
        path = self._next_shard()
        replace_bytes(path, pack_shard(self._open))
        self._append_shard(path, list(_read_samples(path, len(self.shards))))
        self._open.clear()

    def adopt_shard(self, num_samples: int) -> bool:
        """Add the next shard, which an earlier writer wrote completely.

        Returns:
            False if it is missing or damaged, or does not have `num_samples` samples.
        """
        assert not self._open, "a shard is adopted between two others"
        path = self._next_shard()
        try:
            samples = list(_read_samples(path, len(self.shards)))
        except (FileNotFoundError, tarfile.TarError):
            return False
        if len(samples) != num_samples:
            return False
        self._ids.update(sample.id for sample in samples)
        self._append_shard(path, samples)
        return True

    def _next_shard(self) -> Path:
        """Return the path of the next shard."""
        return self.folder / shard_name(len(self.shards))

    def _append_shard(self, path: Path, samples: list[Sample]) -> None:
        """Append a shard to the index."""
        self.samples += samples
        self.shards.append(Shard(path.name, path.stat().st_size, len(samples)))


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.tar"


def remove_shards(folder: Path, which: str = "*") -> None:
    """Remove the index in a folder, then its shards.

    Args:
        folder: folder of the shards.
        which: suffix pattern: `*` removes all shards, `*.part` only the unfinished ones.
    """
    for stale in (folder / INDEX_NAME, *folder.glob(f"shard-*.tar{which}")):
        stale.unlink(missing_ok=True)


def pack_shard(samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> bytes:
    """Pack samples to a tar; each is (id, extension -> content of a member)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for sample_id, contents in samples:
            for extension, content in contents.items():
                entry = tarfile.TarInfo(f"{sample_id}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def complete_members(path: Path) -> dict[str, dict[str, tuple[int, int]]] | None:
    """List the members of a shard as `list_members`; None if it is missing, cut short or damaged."""
    try:
        if path.stat().st_size % tarfile.RECORDSIZE:
            return None
        members = list_members(path)
    except (FileNotFoundError, tarfile.TarError, EOFError, IndexError, ValueError):
        return None
    end = max((offset + size for found in members.values() for offset, size in found.values()), default=0)
    with open(path, "rb") as file:
        # A tar ends with blocks of zeros, but tarfile takes anything that is not a header for the end.
        file.seek(-(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        tail = file.read()
    return members if tail and not any(tail) else None


def list_members(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """List the members of a shard: id of the sample -> extension -> (offset, size) of the member."""
    with tarfile.open(path) as tar:
        found = groupby(tar, key=lambda entry: entry.name.split(".", 1)[0])
        return {
            sample_id: {entry.name.split(".", 1)[1]: (entry.offset_data, entry.size) for entry in entries}
            for sample_id, entries in found
        }


def write_index(
    folder: Path, shards: Sequence[Shard], samples: Iterable[Sample], motion_map: MotionMap
) -> None:
    """Write the index of a folder; the samples must be in the order of the shards."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "motion_map": asdict(motion_map),
        "shards": [asdict(shard) for shard in shards],
    }
    lines = [json.dumps(line) for line in (header, *(sample.as_row() for sample in samples))]
    replace_bytes(folder / INDEX_NAME, "".join(f"{line}\n" for line in lines).encode())


def _read_samples(path: Path, shard: int) -> Iterator[Sample]:
    """Read the index entry of each sample in a shard from its JSON."""
    with open(path, "rb") as file:
        for sample_id, members in list_members(path).items():
            offset, size = members["json"]
            file.seek(offset)
            metadata = json.loads(file.read(size))
            yield Sample.from_metadata(sample_id, shard, members, metadata)
