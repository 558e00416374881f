"""The raw files: which there are, what they are called, and what the files beside them tell."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from svd_ds.curate.listing import Listed, read_listing
from svd_ds.data.sidecar import (
    DEFAULT_CAPTIONER,
    annotations_in,
    captions_in,
    clean_text,
    decode_text,
    is_number,
    parse_json,
    text_in,
)

VIDEOS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".gif"),
    *(".mts", ".m2ts", ".wmv", ".flv", ".3gp"),
)
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
SIDECARS = (".txt", ".caption", ".json")
FILE_NAME = "name"
"""The captioner of a file that has no caption: its name stands in."""


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

    def stamp(self) -> int:
        """Another number when the file is another, or is called otherwise: what is known of it is then
        stale."""
        sidecars = [self.path.with_suffix(suffix) for suffix in SIDECARS]
        about = [path.stat() for path in (self.path, *sidecars) if path.is_file()]
        state = [(each.st_size, each.st_mtime_ns) for each in about]
        listed = f" {json.dumps(self.listed, sort_keys=True)}" if self.listed else ""
        return zlib.crc32(f"{self.key} {state}{listed}".encode())


def find_raw(raw: Path, out: Path) -> list[RawFile]:
    """The raw files of a folder, or of a manifest: a text file with a path a line, relative to its folder.

    Raises FileNotFoundError or ValueError where there is neither, or the manifest names a file twice.
    """
    listed: Listed = {}
    if raw.is_dir():
        listed, lists = read_listing(raw)
        root, paths = raw, [path for path in find_files(raw, out) if path not in lists]
        # A file that is listed and missing is refused by name, and costs no other file.
        there = set(paths)
        paths += [root / name for name in listed if root / name not in there and not (root / name).is_file()]
        if not paths:
            raise ValueError(f"there is no file in {raw}")
    elif raw.is_file() and raw.suffix == ".txt":
        root = raw.parent
        lines = clean_text(decode_text(raw.read_bytes())).splitlines()
        paths = [root / line.strip() for line in lines if line.strip()]
        if missing := next((path for path in paths if not path.is_file()), None):
            raise FileNotFoundError(f"{raw} lists {missing}, and there is no such file")
    else:
        raise FileNotFoundError(f"there is no folder or manifest (.txt) {raw}")
    names = [str(path.relative_to(root) if path.is_relative_to(root) else path) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"{raw} lists {len(names)} files of which {len(set(names))} are different")
    return name_files(names, paths, listed)


def name_files(names: Sequence[str], paths: Sequence[Path], listed: Listed | None = None) -> list[RawFile]:
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
        files.append(RawFile(unique, path, _free_key(clean, keys), (listed or {}).get(name, {})))
    return files


def find_files(folder: Path, out: Path) -> list[Path]:
    """Everything in `folder`, at any depth, but hidden files, sidecars, and what lies under `out`.

    Linked folders are followed, each place once.
    """
    files: list[Path] = []
    visited: set[Path] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        place = Path(here).resolve()
        if place in visited or place == out.resolve() or out.resolve() in place.parents:
            folders.clear()
            continue
        visited.add(place)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        files += [path for name in names if name[0] != "." and (path := Path(here, name)).is_file()]
    media = {path.with_suffix("") for path in files if path.suffix.lower() in VIDEOS + IMAGES}
    return sorted(p for p in files if p.suffix not in SIDECARS or p.with_suffix("") not in media)


def _free_key(name: str, taken: set[str]) -> str:
    """A key from a file's name, added to `taken`; numbered where another file has it already."""
    stem = re.sub(r"[^\w-]+", "_", str(Path(name).with_suffix("")))
    key = next(key for key in chain([stem], (f"{stem}_{n}" for n in count(2))) if key not in taken)
    taken.add(key)
    return key


def told_of(path: Path, listed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Captions, and what else the files next to `path` say of it, as a sample's json holds it.

    `clip.json` may hold captions, annotations (svd_ds/data/sidecar.py has the rules) and "elevation", the
    camera's in degrees; `clip.txt` or `clip.caption` holds a caption; `listed` is the file's row in a list of
    the folder's files. Captions come from the first of these that has any, else the file's own name is one.

    Raises:
        ValueError: the json is unreadable, or its elevation is no angle.
    """
    table, note = path.with_suffix(".json"), _caption_file(path)
    sidecar = parse_json(table.read_bytes(), table.name) if table.is_file() else {}
    row = dict(listed or {})
    captions = captions_in(sidecar)
    if not any(captions.values()) and note is not None:
        captions = {DEFAULT_CAPTIONER: " ".join(text_in(note.read_bytes()).split())}
    if not any(captions.values()):
        captions = captions_in(row)
    if not any(captions.values()):
        captions = {FILE_NAME: re.sub(r"[\W_]+", " ", clean_text(path.stem)).strip()}
    told: dict[str, Any] = {"captions": captions}

    elevation = (row | sidecar if isinstance(sidecar, dict) else row).get("elevation")
    if elevation is not None:
        if not is_number(elevation) or not -90 <= elevation <= 90:
            raise ValueError(f'"elevation" is {elevation!r} in {table.name}: no angle, -90 to 90 degrees')
        told["elevation"] = float(elevation)
    annotations = annotations_in(row)[0] | annotations_in(sidecar)[0]
    if annotations:
        told["annotations"] = annotations
    return told


def _caption_file(path: Path) -> Path | None:
    notes = (path.with_suffix(suffix) for suffix in (".txt", ".caption"))
    return next((note for note in notes if note.is_file()), None)
