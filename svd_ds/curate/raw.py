"""Discovery of raw files, and their names and keys."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from stat import S_ISREG
from typing import Any

from svd_ds.curate.listing import FileFinder, Listing, merge_rows, read_listing
from svd_ds.curate.sidecars import SUFFIXES, find_sidecars
from svd_ds.data.sidecar import clean_text, decode_text

VIDEOS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".gif"),
    *(".mts", ".m2ts", ".wmv", ".flv", ".3gp"),
)
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
MAX_KEY = 120
"""Maximum length of a key in bytes; leaves room for suffixes in file names that begin with it."""


@dataclass(frozen=True)
class RawFile:
    """A file that is, or claims to be, a video or an image."""

    name: str
    """Path relative to the folder or to the manifest's folder: column `video` of the tables."""
    path: Path
    key: str
    """Name as the prefix of sample ids: unique; letters, digits, `_` and `-`."""
    listed: Mapping[str, Any] = field(default_factory=dict)
    """The file's row in a list of the folder's files (svd_ds/curate/listing.py)."""
    fault: str | None = None
    """Reason why the file cannot be read, if that was found before it was opened."""

    def stamp(self, is_file: Callable[[str], bool] = os.path.isfile) -> int:
        """Return a checksum that changes when the file, its sidecars, its name or its row in a list change.

        Results with another stamp are stale.

        Args:
            is_file: replacement for `os.path.isfile`, such as `FolderListings.is_file`, for the stamps of
                many files.
        """
        stats = [_stat_or_none(path) for path in (self.path, *find_sidecars(self.path, is_file))]
        state = [(each.st_size, each.st_mtime_ns) for each in stats if each is not None]
        listed = f" {json.dumps(self.listed, sort_keys=True)}" if self.listed else ""
        return zlib.crc32(f"{self.key} {state}{listed}{self.fault or ''}".encode())


def find_raw_files(raw: Path, out: Path) -> list[RawFile]:
    """Return the raw files of a folder, or of a manifest: a text file with one path a line, relative to its
    folder.

    Unreadable files are included, with their fault: broken links, folders without read permission, lists with
    bad rows, listed files that do not exist.

    Raises:
        FileNotFoundError: there is neither a folder nor a manifest.
        ValueError: the folder or manifest has no files.
    """
    faults: dict[Path, str] = {}
    listed: dict[Path, list[dict[str, Any]]] = {}
    if raw.is_dir():
        root, paths = raw, walk_folder(raw, out, faults)
        listing = read_listing(raw)
        paths = [path for path in paths if path not in listing.lists]
        listed = _rows_by_path(listing, root, paths)
        paths += sorted(listed.keys() - set(paths))
        faults |= dict(listing.fault_summaries())
        paths += [path for path in faults if path not in paths]
    elif raw.is_file() and raw.suffix == ".txt":
        root = raw.parent
        lines = decode_text(raw.read_bytes()).splitlines()
        paths = list(dict.fromkeys(root / line.strip() for line in lines if line.strip()))
    else:
        raise FileNotFoundError(f"there is no folder or manifest (.txt) {raw}")
    if not paths:
        raise ValueError(f"there is no file in {raw}")
    names = [str(path.relative_to(root) if path.is_relative_to(root) else path) for path in paths]
    return name_files(names, paths, {path: merge_rows(rows) for path, rows in listed.items()}, faults)


def _rows_by_path(listing: Listing, root: Path, paths: Sequence[Path]) -> dict[Path, list[dict[str, Any]]]:
    """Return the rows of each listed file, whether it exists or not."""
    finder = FileFinder(root, (str(path.relative_to(root)) for path in paths))
    listed: dict[Path, list[dict[str, Any]]] = {}
    for name, row in listing.rows:
        listed.setdefault(root / (finder.find(name) or name), []).append(row)
    return listed


def name_files(
    names: Sequence[str],
    paths: Sequence[Path],
    listed: Mapping[Path, Mapping[str, Any]] | None = None,
    faults: Mapping[Path, str] | None = None,
) -> list[RawFile]:
    """Make raw files with unique names and keys.

    All files are named at once, because two names may become equal when special characters are replaced.
    Names that are not UTF-8 get replacement characters.
    """
    keys: set[str] = set()
    shown: set[str] = set()
    files = []
    for name, path in zip(names, paths, strict=True):
        clean = clean_text(name)
        unique = next(
            each for each in chain([clean], (f"{clean}_{n}" for n in count(2))) if each not in shown
        )
        shown.add(unique)
        row, fault = (listed or {}).get(path, {}), (faults or {}).get(path) or _find_fault(path)
        files.append(RawFile(unique, path, _unique_key(clean, keys), row, fault))
    return files


def _stat_or_none(path: Path) -> os.stat_result | None:
    """Return the status of a file; None if it does not exist or cannot be accessed."""
    try:
        return path.stat()
    except (OSError, ValueError):
        return None


def _find_fault(path: Path) -> str | None:
    """Return the reason why a file cannot be opened, or None."""
    try:
        state = path.stat()
    except (OSError, ValueError) as error:
        if os.path.islink(path):
            return "it is a broken link"
        reason = error.strerror if isinstance(error, OSError) else error
        missing = isinstance(error, FileNotFoundError)
        return "it is listed, but does not exist" if missing else f"it cannot be opened ({reason})"
    return None if S_ISREG(state.st_mode) else "it is not a regular file"


def walk_folder(folder: Path, out: Path, faults: dict[Path, str]) -> list[Path]:
    """Return all files in `folder`, at any depth, except hidden files, sidecars, and files inside `out`.

    Linked folders are followed, each folder once. Unreadable folders are added to `faults`.
    """
    files: list[Path] = []
    visited: set[Path] = set()

    def refuse(error: OSError) -> None:
        faults[Path(error.filename)] = f"the folder cannot be read ({error.strerror})"

    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folder_path = Path(here).resolve()
        if folder_path in visited or folder_path == out.resolve() or out.resolve() in folder_path.parents:
            folders.clear()
            continue
        visited.add(folder_path)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        files += [Path(here, name) for name in names if name[0] != "."]
    media = {path for path in files if path.suffix.lower() in VIDEOS + IMAGES}
    media |= {path.with_suffix("") for path in media}
    return sorted(p for p in files if p.suffix.lower() not in SUFFIXES or p.with_suffix("") not in media)


def _unique_key(name: str, taken: set[str]) -> str:
    """Make a key from a file's name, numbered if it is already in `taken`, and add it to `taken`."""
    stem = re.sub(r"[^\w-]+", "_", str(Path(name).with_suffix("")))
    stem = stem.encode()[:MAX_KEY].decode(errors="ignore")
    key = next(key for key in chain([stem], (f"{stem}_{n}" for n in count(2))) if key not in taken)
    taken.add(key)
    return key
