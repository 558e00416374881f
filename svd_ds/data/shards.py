"""Shards and their index, as docs/data.md fixes them: written atomically, checked when loaded.

An index of any size costs eight bytes a sample in memory: a line is parsed when its sample is asked for, so a
loader's worker processes start at once and share the file through the page cache.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from svd_ds.data.motion import MotionMap

INDEX_NAME = "index.jsonl"
FORMAT = "svd_ds shards"
VERSION = 1
MEDIA = ("mp4", "jpg")
"""Extensions of a sample's pixels: a clip, or a still image as a clip of one frame."""


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

    @property
    def media(self) -> str:
        """The extension of the sample's pixels."""
        return next(name for name in MEDIA if name in self.members)


@dataclass(frozen=True)
class Index:
    """The samples of a folder of shards, or those of them that were kept."""

    folder: Path
    shards: tuple[Shard, ...]
    shard_sizes: tuple[int, ...]
    """Kept samples of each shard."""
    line_offsets: np.ndarray
    """int64, (num_samples,): where each kept sample's line begins in the index."""
    motion_map: MotionMap
    fingerprint: str
    """16 hexadecimal digits that name this set: a hash of the index's bytes and of the choice among them."""

    @staticmethod
    def load(folder: str | Path) -> Index:
        """Read the index of `folder` and check that every shard is there in full.

        Raises FileNotFoundError or ValueError, in one sentence, for a missing folder, index or shard, an
        index that is cut short or not ours, a shard whose size is not the one in the index.
        """
        folder = Path(folder)
        path = folder / INDEX_NAME
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no data folder {folder}; tools/make_shards.py makes one")
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {INDEX_NAME}; tools/make_shards.py writes it at its end"
            )
        content = path.read_bytes()
        header = _parse_header(path, content)
        shards = tuple(Shard(**shard) for shard in header["shards"])
        line_ends = np.flatnonzero(np.frombuffer(content, dtype=np.uint8) == ord("\n"))
        expected = sum(shard.num_samples for shard in shards)
        if len(line_ends) - 1 != expected:
            raise ValueError(f"{path} is cut short: it lists {len(line_ends) - 1} of its {expected} samples")
        for shard in shards:
            _check_shard(folder / shard.name, shard.num_bytes)
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
        with open(self.folder / INDEX_NAME, "rb") as file:
            for offset in self.line_offsets:
                file.seek(int(offset))
                yield _parse_sample(file.readline())

    def sample(self, number: int) -> Sample:
        """Sample `number`, counted through the shards in turn."""
        return next(replace(self, line_offsets=self.line_offsets[number : number + 1]).samples())

    def keep(self, wanted: Callable[[Sample], bool]) -> Index:
        """The index of the samples that `wanted` accepts, in the same order."""
        kept = np.fromiter((wanted(sample) for sample in self.samples()), dtype=bool, count=len(self))
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
        offset, size = sample.members[member]
        path = self.folder / self.shards[sample.shard].name
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) != size:
            raise ValueError(f"{path} holds {len(content)} of the {size} bytes of {sample.id}.{member}")
        return content


class ShardWriter:
    """Writes samples as shards with their index. The same samples give the same bytes.

    A shard appears under its name only when it is whole, the index only when all shards are: a folder with
    an index is complete.
    """

    def __init__(self, folder: str | Path, samples_per_shard: int = 16, overwrite: bool = False) -> None:
        """Creates `folder`. Raises ValueError where it already holds an index, unless to `overwrite` it."""
        if samples_per_shard < 1:
            raise ValueError(f"a shard holds at least 1 sample, not {samples_per_shard}")
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.shards: list[Shard] = []
        self.samples: list[Sample] = []
        self._ids: set[str] = set()
        self._open: list[tuple[str, dict[str, bytes], dict[str, Any]]] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        index = self.folder / INDEX_NAME
        if index.exists() and not overwrite:
            raise ValueError(
                f"{self.folder} already holds shards; choose another folder, or --overwrite them"
            )
        for stale in (index, *self.folder.glob("shard-*.tar*")):
            stale.unlink(missing_ok=True)

    def add(self, sample_id: str, media: str, content: bytes, about: Mapping[str, Any]) -> None:
        """Append a sample.

        Args:
            sample_id: letters, digits, `_` and `-`; unique in the data set.
            media: "mp4" or "jpg", the extension of `content`.
            about: what the sample's json holds; at least captions, num_frames, fps, height, width, motion.
        """
        if not re.fullmatch(r"[\w-]+", sample_id):
            raise ValueError(f"sample id {sample_id!r} may hold only letters, digits, _ and -")
        if sample_id in self._ids:
            raise ValueError(f"two samples have the id {sample_id}")
        self._ids.add(sample_id)
        text = json.dumps(about, ensure_ascii=False, sort_keys=True).encode()
        self._open.append((sample_id, {"json": text, media: content}, dict(about)))
        if len(self._open) == self.samples_per_shard:
            self.end_shard()

    def close(self, motion_map: MotionMap | None = None) -> MotionMap:
        """Write what is left and the index, with `motion_map` or one calibrated on these samples."""
        self.end_shard()
        if motion_map is None:
            motion_map = MotionMap.calibrate([clip.motion for clip in self.samples if clip.num_frames > 1])
        header = {
            "format": FORMAT,
            "version": VERSION,
            "motion_map": asdict(motion_map),
            "shards": [asdict(shard) for shard in self.shards],
        }
        lines = [json.dumps(line) for line in (header, *map(asdict, self.samples))]
        _replace_file(self.folder / INDEX_NAME, "".join(f"{line}\n" for line in lines).encode())
        return motion_map

    def end_shard(self) -> None:
        """Write the samples added since the last shard, if any, as a shard."""
        if not self._open:
            return
        name = f"shard-{len(self.shards):05d}.tar"
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for sample_id, contents, about in self._open:
                members = {}
                for extension, content in contents.items():
                    entry = tarfile.TarInfo(f"{sample_id}.{extension}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
                    padded = -len(content) % tarfile.BLOCKSIZE + len(content)
                    members[extension] = (tar.offset - padded, len(content))
                known = {name: about[name] for name in ("num_frames", "fps", "height", "width", "motion")}
                self.samples.append(Sample(id=sample_id, shard=len(self.shards), members=members, **known))
        _replace_file(self.folder / name, buffer.getvalue())
        self.shards.append(Shard(name, len(buffer.getvalue()), len(self._open)))
        self._open.clear()


def _replace_file(path: Path, content: bytes) -> None:
    """Write a file so that its name never stands for half of it."""
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(content)
    os.replace(partial, path)


def _parse_header(path: Path, content: bytes) -> dict[str, Any]:
    try:
        header = json.loads(content[: content.find(b"\n") + 1])
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} does not begin with the header of an index of {FORMAT}")
    if header["version"] != VERSION:
        raise ValueError(f"{path} has format version {header['version']}; this program reads {VERSION}")
    return header


def _parse_sample(line: bytes) -> Sample:
    fields = json.loads(line)
    fields["members"] = {name: tuple(span) for name, span in fields["members"].items()}
    return Sample(**fields)


def _check_shard(path: Path, num_bytes: int) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"shard {path} is missing, though the index beside it lists it")
    actual = path.stat().st_size
    if actual != num_bytes:
        cause = "it is truncated" if actual < num_bytes else "it is not the file that was indexed"
        raise ValueError(f"shard {path} has {actual} bytes where its index says {num_bytes}: {cause}")
