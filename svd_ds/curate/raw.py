"""The raw files: which there are, and what they are called."""

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

from svd_ds.curate.listing import Finder, Listing, merged, read_listing
from svd_ds.curate.sidecars import SUFFIXES, sidecars_of
from svd_ds.data.sidecar import clean_text, decode_text

VIDEOS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".gif"),
    *(".mts", ".m2ts", ".wmv", ".flv", ".3gp"),
)
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
MAX_KEY = 120
"""Bytes of a key: names of files that begin with it have room for more."""


@dataclass(frozen=True)
class RawFile:
    """A file that is, or says it is, a video or an image."""

    name: str
    """Its path below the folder or the manifest's: what tables call `video`."""
    path: Path
    key: str
    """Its name as the beginning of sample ids: unique, letters, digits, `_` and `-`."""
    listed: Mapping[str, Any] = field(default_factory=dict)
    """What a list of the folder's files says of it (svd_ds/curate/listing.py)."""
    fault: str | None = None
    """Why it cannot be read, where that was found before it was opened."""

    def stamp(self, is_file: Callable[[str], bool] = os.path.isfile) -> int:
        """Another number when the file is another, or is called otherwise: what is known of it is then
        stale.

        Args:
            is_file: as `FolderListings.is_file`, for the stamps of many files.
        """
        about = [_state(path) for path in (self.path, *sidecars_of(self.path, is_file))]
        state = [(each.st_size, each.st_mtime_ns) for each in about if each is not None]
        listed = f" {json.dumps(self.listed, sort_keys=True)}" if self.listed else ""
        return zlib.crc32(f"{self.key} {state}{listed}{self.fault or ''}".encode())


def find_raw(raw: Path, out: Path) -> list[RawFile]:
    """The raw files of a folder, or of a manifest: a text file with a path a line, relative to its folder.

    What cannot be read is among them, with its fault: a broken link, a folder that cannot be looked into, a
    list with rows that cannot be used, a file that is listed and missing.

    Raises:
        FileNotFoundError: there is neither a folder nor a manifest.
        ValueError: it lists or holds no file.
    """
    faults: dict[Path, str] = {}
    listed: dict[Path, list[dict[str, Any]]] = {}
    if raw.is_dir():
        root, paths = raw, find_files(raw, out, faults)
        listing = read_listing(raw)
        paths = [path for path in paths if path not in listing.lists]
        listed = _paths_of(listing, root, paths)
        paths += sorted(listed.keys() - set(paths))
        faults |= dict(listing.reasons())
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
    return name_files(names, paths, {path: merged(rows) for path, rows in listed.items()}, faults)


def _paths_of(listing: Listing, root: Path, paths: Sequence[Path]) -> dict[Path, list[dict[str, Any]]]:
    """The rows of each file that is listed, whether it is there or not."""
    finder = Finder(root, (str(path.relative_to(root)) for path in paths))
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
    """Give each file its key: all files at once, since two names may look alike without their signs.

    Names are made encodable here: a file system may hold names that are no UTF-8.
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
        about, fault = (listed or {}).get(path, {}), (faults or {}).get(path) or _fault_of(path)
        files.append(RawFile(unique, path, _free_key(clean, keys), about, fault))
    return files


def _state(path: Path) -> os.stat_result | None:
    """None where there is nothing, or it may not be looked at."""
    try:
        return path.stat()
    except (OSError, ValueError):
        return None


def _fault_of(path: Path) -> str | None:
    """Why a file cannot be opened."""
    try:
        state = path.stat()
    except (OSError, ValueError) as error:
        if os.path.islink(path):
            return "it is a link that leads to no file"
        reason = error.strerror if isinstance(error, OSError) else error
        missing = isinstance(error, FileNotFoundError)
        return "it is listed, and there is no such file" if missing else f"it cannot be opened ({reason})"
    return None if S_ISREG(state.st_mode) else "it is no regular file"


def find_files(folder: Path, out: Path, faults: dict[Path, str]) -> list[Path]:
    """Everything in `folder`, at any depth, but hidden files, sidecars, and what lies under `out`.

    Linked folders are followed, each place once. `faults` gets the folders that cannot be looked into.
    """
    files: list[Path] = []
    visited: set[Path] = set()

    def refuse(error: OSError) -> None:
        faults[Path(error.filename)] = f"it is a folder that cannot be looked into ({error.strerror})"

    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        place = Path(here).resolve()
        if place in visited or place == out.resolve() or out.resolve() in place.parents:
            folders.clear()
            continue
        visited.add(place)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        files += [Path(here, name) for name in names if name[0] != "."]
    media = {path for path in files if path.suffix.lower() in VIDEOS + IMAGES}
    media |= {path.with_suffix("") for path in media}
    return sorted(p for p in files if p.suffix.lower() not in SUFFIXES or p.with_suffix("") not in media)


def _free_key(name: str, taken: set[str]) -> str:
    """A key from a file's name, added to `taken`; numbered where another file has it already."""
    stem = re.sub(r"[^\w-]+", "_", str(Path(name).with_suffix("")))
    stem = stem.encode()[:MAX_KEY].decode(errors="ignore")
    key = next(key for key in chain([stem], (f"{stem}_{n}" for n in count(2))) if key not in taken)
    taken.add(key)
    return key
