"""Indexing of a folder of external shards: find them, probe them one by one, and write the index at the end.

The samples of a shard are cached in a part file until the index is written, so that a stopped program
resumes. A part is valid only for a shard of the same name, size and times: shards may be added, replaced,
renamed and removed in between.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from stat import S_ISREG

from svd_ds.data.external_shards import ProbedSample, ScoreMotion, probe_shard
from svd_ds.data.folders import INDEX_NAME
from svd_ds.data.motion import MotionMap
from svd_ds.data.quarantine import REFUSED, Fault, describe_error, refused_csv_lines
from svd_ds.data.sample import Sample, Shard, check_local_name, parse_sample
from svd_ds.data.sidecar import clean_text
from svd_ds.data.tars import COMPRESSED_REASON, MACOS_FOLDER, is_compressed_name
from svd_ds.data.writer import write_index
from svd_ds.fsync_io import replace_text
from svd_ds.json_lines import read_json_lines

PARTS_FOLDER = ".index-parts"
"""Sub-folder of the index's folder that holds the part files until the index is written."""
PART_VERSION = 3
SHARDS_LINK = "shards"
"""Link to the folder of the shards, for an index in another folder."""


@dataclass(frozen=True)
class _ShardState:
    """State of a shard that a part file belongs to; for any other state the part is stale."""

    name: str
    motion: bool
    num_bytes: int
    mtime_ns: int
    ctime_ns: int
    version: int = PART_VERSION


@dataclass
class ProbedFolder:
    """Samples and faults found so far in the shards of a folder."""

    shards: list[Shard] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    """Number of cases of each remark, see `ProbedSample.notes`."""
    _ids: set[str] = field(default_factory=set)

    def add(self, name: str, num_bytes: int, items: Iterable[ProbedSample | Fault]) -> None:
        """Add the samples of a shard; a number is appended to ids that are in use already."""
        samples = []
        for item in items:
            if isinstance(item, Fault):
                self.faults.append(item)
                continue
            self.notes.update(item.notes)
            sample_id, count = item.sample.id, 1
            while sample_id in self._ids:
                count += 1
                sample_id = f"{item.sample.id}_{count}"
            self._ids.add(sample_id)
            samples.append(replace(item.sample, id=sample_id, shard=len(self.shards)))
        if samples:
            self.samples += samples
            self.shards.append(Shard(name, num_bytes, len(samples)))


def find_shards(folder: Path) -> tuple[list[str], list[Fault]]:
    """Find the tars in a folder at any depth.

    Links are followed; a folder or file with several links counts once. Hidden files and folders, and those
    that macOS adds, are left out.

    Returns:
        The sorted names relative to `folder`, and the faults of folders and files that cannot be read.
    """
    names: list[str] = []
    faults: list[Fault] = []
    visited: set[str] = set()

    def refuse(error: OSError) -> None:
        faults.append(Fault("", clean_text(str(error.filename)), describe_error(error)))

    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        # Real folders come before links to them, and both in the order of their names.
        folders[:] = sorted(
            (name for name in folders if name[0] != "." and name != MACOS_FOLDER),
            key=lambda name: (os.path.islink(os.path.join(parent, name)), name),
        )
        if _was_visited(parent, visited):
            folders.clear()
            continue
        for name in files:
            relative = os.path.relpath(os.path.join(parent, name), folder)
            if name[0] != "." and name.lower().endswith(".tar"):
                names.append(relative)
            elif name[0] != "." and is_compressed_name(name):
                faults.append(Fault("", clean_text(relative), COMPRESSED_REASON))
    names.sort(key=lambda name: (os.path.islink(folder / name), name))
    return sorted(name for name in names if not _was_visited(folder / name, visited)), faults


def _was_visited(path: str | Path, visited: set[str]) -> bool:
    """Return True if the real path is in `visited`, and add it otherwise."""
    real = os.path.realpath(path)
    if real in visited:
        return True
    visited.add(real)
    return False


def probe_shards(
    folder: Path,
    names: Iterable[str],
    parts: Path,
    motion: ScoreMotion | None,
    found: ProbedFolder,
    prefix: str = "",
) -> None:
    """Probe each shard, unless its part file is valid, and add it to `found`.

    Args:
        folder: folder of the shards.
        names: names of the shards relative to `folder`.
        parts: folder of the part files.
        motion: scores a video; None leaves all motion scores at 0.
        found: result, changed in place.
        prefix: prefix of the names of the shards in the index.

    Raises:
        MemoryError: the machine ran out of memory.
        OSError: a part file cannot be written.
    """
    for name in names:
        shown = clean_text(name)
        if shown != name:
            found.faults.append(Fault("", shown, "its name is not UTF-8: rename it"))
            continue
        part = parts / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.jsonl"
        try:
            check_local_name(name)
            state = _shard_state(folder / name, name, motion is not None)
            items = cached = _read_part(part, state)
            if items is None:
                items = list(probe_shard(folder / name, name, motion))
                if _shard_state(folder / name, name, motion is not None) != state:
                    raise ValueError("it was changed while it was read")
        except (ValueError, OSError) as error:
            found.faults.append(Fault("", shown, describe_error(error)))
            continue
        if cached is None:
            _write_part(part, state, items)
        found.add(f"{prefix}{name}", state.num_bytes, items)


def _shard_state(path: Path, name: str, motion: bool) -> _ShardState:
    """Return the state of a shard.

    Raises:
        OSError: the file is missing.
        ValueError: it is not a regular file.
    """
    state = path.stat()
    if not S_ISREG(state.st_mode):
        raise ValueError("it is not a regular file")
    return _ShardState(name, motion, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


def _read_part(path: Path, state: _ShardState) -> list[ProbedSample | Fault] | None:
    """Read a part file; None if it is missing, damaged, or belongs to another state of the shard."""
    try:
        lines = read_json_lines(path)
    except (ValueError, OSError):
        return None
    if lines.damage is not None or not lines.rows or lines.rows[0] != asdict(state):
        return None
    try:
        return [
            Fault(**row["fault"])
            if "fault" in row
            else ProbedSample(parse_sample(row["sample"]), row["notes"])
            for row in lines.rows[1:]
        ]
    except (KeyError, TypeError, ValueError):
        return None


def _write_part(path: Path, state: _ShardState, items: Iterable[ProbedSample | Fault]) -> None:
    """Write a part file: the state of the shard, then a line for each sample or fault."""
    found = [
        {"fault": asdict(item)}
        if isinstance(item, Fault)
        else {"sample": item.sample.as_row(), "notes": item.notes}
        for item in items
    ]
    rows = [asdict(state), *found]
    replace_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def index_folder(
    folder: Path,
    out: Path,
    motion: ScoreMotion | None,
    overwrite: bool,
    track: Callable[[list[str]], Iterable[str]],
) -> ProbedFolder:
    """Write the index of external shards, and the list of refused samples (REFUSED).

    Args:
        folder: folder of the shards.
        out: folder of the index; may be `folder`.
        motion: scores a video; None leaves all motion scores at 0.
        overwrite: replace an index that exists.
        track: iterates over the names of the shards and shows the progress.

    Returns:
        The samples and faults that were found.

    Raises:
        FileNotFoundError: `folder` is missing.
        ValueError: there are no shards, no sample can be used, or `out` has an index and `overwrite` is
            False.
        OSError: `out` cannot be written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    names, faults = find_shards(folder)
    if not names:
        raise ValueError(f"there is no .tar in {folder}")
    if (out / INDEX_NAME).exists() and not overwrite:
        raise ValueError(f"{out} already has an {INDEX_NAME}: choose another --out, or --overwrite it")
    parts = out / PARTS_FOLDER
    try:
        parts.mkdir(parents=True, exist_ok=True)
        if overwrite:
            shutil.rmtree(parts)
            parts.mkdir()
    except OSError as error:
        raise OSError(
            f"{out} cannot be written to ({error.strerror}): choose another folder by --out"
        ) from error
    is_same_folder = out.resolve() == folder.resolve()
    if not is_same_folder:
        _link(out / SHARDS_LINK, folder, overwrite)
    found = ProbedFolder(faults=faults)
    probe_shards(folder, track(names), parts, motion, found, "" if is_same_folder else f"{SHARDS_LINK}/")
    replace_text(out / REFUSED, "".join(refused_csv_lines(found.faults)))
    if not found.samples:
        raise ValueError(f"none of the samples in {folder} can be used: {out / REFUSED} says why")
    scores = [sample.motion for sample in found.samples if sample.num_frames > 1]
    write_index(out, found.shards, found.samples, MotionMap.calibrate(scores))
    shutil.rmtree(parts)
    return found


def _link(link: Path, folder: Path, overwrite: bool) -> None:
    """Make `link` a symbolic link to `folder`.

    Raises:
        ValueError: another file or link of that name exists.
    """
    target = folder.resolve()
    if link.is_symlink() and (overwrite or not link.exists()):
        link.unlink()
    if link.is_symlink() or link.exists():
        if link.resolve() != target:
            raise ValueError(f"{link} exists, but is not a link to {target}: choose another --out")
        return
    link.symlink_to(target, target_is_directory=True)
