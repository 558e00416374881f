"""The manifest of a checkpoint, its file COMPLETE: size and checksum of every other file.

    {"format": 1, "token": "5f0c...", "world_size": 2, "proven": true,
     "files": {"unet/rank-00000-of-00002.safetensors": {"size": 1234, "xxh3_128": "99aa..."}, ...},
     "xxh3_128": "0d3e..."}

The last entry is the checksum of the others, so damage of the manifest itself is detected. restarts.py
defines complete, intact, valid and proven checkpoints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from svd_ds.small_files import read_json

COMPLETE = "COMPLETE"
"""File name of the manifest, which is written last."""
FORMAT = 1
OLD_CONTENT = re.compile(rb"[0-9a-f]{8}\n?")
"""Content of COMPLETE before it was a manifest: the token alone."""
CHUNK = 2**22
"""Bytes that are read and hashed at once; other threads may run between two chunks."""
NUM_THREADS = 4
"""Number of files that are hashed at the same time."""


class _OtherFormat(ValueError):
    """The manifest is intact, and has a format that this version does not know."""


@dataclass(frozen=True)
class FileDigest:
    """Size and checksum of the content of a file."""

    size: int
    """Bytes."""
    xxh3_128: str
    """128-bit xxHash of the content, in hexadecimal; it detects damage and is not a signature."""


@dataclass(frozen=True)
class Manifest:
    """The content of COMPLETE."""

    token: str
    """Token of the restart that saved the checkpoint (restarts.py)."""
    world_size: int
    """Number of ranks that saved it."""
    proven: bool
    """True if the checkpoint was proven before it was committed: a training step from its weights was
    taken."""
    files: Mapping[str, FileDigest]
    """Digest of each file, by its path inside the checkpoint."""

    def as_json(self) -> str:
        """Serialise; `read_manifest` is the inverse."""
        values = {"format": FORMAT, **asdict(self)}
        return json.dumps({**values, "xxh3_128": _checksum(values)}, indent=1) + "\n"


def read_manifest(checkpoint: Path) -> Manifest:
    """Read the manifest of a checkpoint folder.

    Raises:
        ValueError: the manifest is missing, empty, damaged or of another format, or names a file outside the
            folder; the message names the manifest.
        OSError: it cannot be read.
    """
    path = checkpoint / COMPLETE
    if not path.is_file():
        raise ValueError(f"the checkpoint {checkpoint} is not complete: it has no file {COMPLETE}")
    if OLD_CONTENT.fullmatch(path.read_bytes()):
        raise ValueError(f"{path} has no checksums: the checkpoint was saved by an older version of svd_ds")
    values = read_json(path)
    try:
        checksum = values.pop("xxh3_128")
        if checksum != _checksum(values):
            raise ValueError("its own checksum differs")
        if (version := values.pop("format")) != FORMAT:
            raise _OtherFormat(
                f"{path} has the format {version} of another version of svd_ds, and this one reads {FORMAT}"
            )
        files = {str(name): FileDigest(**digest) for name, digest in values.pop("files").items()}
        if outside := [name for name in files if not _is_inside(name)]:
            raise ValueError(f"it lists {outside[0]!r}, which is not inside the checkpoint")
        return Manifest(**values, files=files)
    except _OtherFormat:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: it is not the manifest of a checkpoint ({error})") from None


def compute_digest(path: Path) -> FileDigest:
    """Read a file to its end and compute its digest.

    Raises:
        OSError: the file cannot be read.
    """
    hasher, buffer, size = xxhash.xxh3_128(), memoryview(bytearray(CHUNK)), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
            size += count
    return FileDigest(size, hasher.hexdigest())


def find_damage(
    checkpoint: Path,
    manifest: Manifest,
    names: Iterable[str] | None = None,
    *,
    checksums: bool = True,
    progress: Callable[[int], None] = lambda size: None,
) -> str | None:
    """Compare files of a checkpoint with its manifest.

    Args:
        checkpoint: the folder.
        manifest: its manifest.
        names: names of the files to compare, as the manifest has them; None means all of them.
        checksums: also read the files; otherwise only their sizes are compared.
        progress: called with the size of each file that has been compared.

    Returns:
        The name of the first file that differs, and how it differs; None if no file differs.
    """
    wanted = list(manifest.files if names is None else names)

    def compare(name: str) -> str | None:
        found = _difference(checkpoint / name, manifest.files.get(name), checksums)
        progress(manifest.files[name].size if name in manifest.files else 0)
        return f"{name} {found}" if found else None

    with ThreadPoolExecutor(max_workers=NUM_THREADS, thread_name_prefix="verify") as threads:
        return next((found for found in threads.map(compare, wanted) if found), None)


def check_checkpoint(checkpoint: Path, names: Iterable[str] | None = None) -> None:
    """Verify files of a checkpoint before they are used; the arguments are those of `find_damage`.

    Raises:
        ValueError: a file is missing or damaged; the message names it.
    """
    if damage := find_damage(checkpoint, read_manifest(checkpoint), names):
        raise ValueError(f"the checkpoint {checkpoint} is damaged: {damage}")


def files_by_folder(checkpoint: Path) -> dict[str, list[str]]:
    """Group the files that a checkpoint's manifest lists by their folder.

    Returns:
        Folder -> names of its files; the files outside of any folder are at "".

    Raises:
        ValueError: the manifest is missing or damaged, see `read_manifest`.
    """
    folders: dict[str, list[str]] = {}
    for name in read_manifest(checkpoint).files:
        folders.setdefault(name.rpartition("/")[0], []).append(name)
    return folders


def _difference(path: Path, expected: FileDigest | None, checksums: bool) -> str | None:
    if expected is None:
        return f"is not among the files that {COMPLETE} lists"
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"has {size} bytes, and {expected.size} were written"
        if checksums and compute_digest(path) != expected:
            return "has another checksum than what was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _checksum(values: Mapping[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128(canonical.encode()).hexdigest()
