"""The raw files: which there are, what they are called, and what the files beside them tell."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".gif")
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
SIDECARS = (".txt", ".json")
FILE_NAME = "name"
"""The captioner of a file of which nothing is told."""
TOLD = ("caption", "captions", "elevation", "annotations")
"""What a .json beside a file may tell of it."""


@dataclass(frozen=True)
class RawFile:
    """A file that is, or says it is, a video or an image."""

    name: str
    """Its path below the folder or the manifest's: what tables call `video`."""
    path: Path
    key: str
    """Its name as the beginning of sample ids: unique, letters, digits, `_` and `-`."""

    def stamp(self) -> int:
        """Another number when the file is another, or is called otherwise: what is known of it is then
        stale."""
        beside = [path for suffix in SIDECARS if (path := self.path.with_suffix(suffix)).is_file()]
        about = [path.stat() for path in (self.path, *beside)]
        state = [(each.st_size, each.st_mtime_ns) for each in about]
        return zlib.crc32(f"{self.key} {state}".encode())


def find_raw(raw: Path, out: Path) -> list[RawFile]:
    """The raw files of a folder, or of a manifest: a text file with a path a line, relative to its folder.

    Raises FileNotFoundError or ValueError where there is neither, or the manifest names a file twice.
    """
    if raw.is_dir():
        root, paths = raw, find_files(raw, out)
    elif raw.is_file() and raw.suffix == ".txt":
        root = raw.parent
        paths = [root / line.strip() for line in raw.read_text().splitlines() if line.strip()]
        if missing := next((path for path in paths if not path.is_file()), None):
            raise FileNotFoundError(f"{raw} lists {missing}, and there is no such file")
    else:
        raise FileNotFoundError(f"there is no folder or manifest (.txt) {raw}")
    names = [str(path.relative_to(root) if path.is_relative_to(root) else path) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"{raw} lists {len(names)} files of which {len(set(names))} are different")
    return name_files(names, paths)


def name_files(names: Sequence[str], paths: Sequence[Path]) -> list[RawFile]:
    """Give each file its key: all files at once, since two names may look alike without their signs."""
    taken: set[str] = set()
    return [RawFile(name, path, _free_key(name, taken)) for name, path in zip(names, paths, strict=True)]


def find_files(folder: Path, out: Path) -> list[Path]:
    """Everything in `folder`, at any depth, but hidden files, sidecars, and what lies under `out`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."]
    media = {path.with_suffix("") for path in files if path.suffix.lower() in VIDEOS + IMAGES}
    sidecars = {path for path in files if path.suffix in SIDECARS and path.with_suffix("") in media}
    return [path for path in files if path not in sidecars and out.resolve() not in path.resolve().parents]


def _free_key(name: str, taken: set[str]) -> str:
    """A key from a file's name, added to `taken`; numbered where another file has it already."""
    stem = re.sub(r"[^\w-]+", "_", str(Path(name).with_suffix("")))
    key = next(key for key in chain([stem], (f"{stem}_{n}" for n in count(2))) if key not in taken)
    taken.add(key)
    return key


def told_of(path: Path) -> dict[str, Any]:
    """Captions, and what else the files beside `path` tell of it, as a sample's json holds it.

    `clip.txt` holds a caption. `clip.json` may have a "caption", or "captions" by captioner; "elevation", the
    camera's in degrees; "annotations", numbers by name. Without captions the file's own name is one. Raises
    ValueError for values of another kind.
    """
    note, content = path.with_suffix(".txt"), _table_beside(path)
    captions = content.get("captions", {"text": content["caption"]} if "caption" in content else {})
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise ValueError(f'{path.stem}.json has a "caption" or "captions" that are not texts')
    if not captions and note.is_file():
        captions = {"text": " ".join(note.read_text().split())}
    told: dict[str, Any] = {"captions": captions or {FILE_NAME: re.sub(r"[\W_]+", " ", path.stem).strip()}}

    elevation, annotations = content.get("elevation"), content.get("annotations", {})
    if elevation is not None:
        if not _is_number(elevation) or not -90 <= elevation <= 90:
            raise ValueError(f'"elevation" is {elevation!r} in {path.stem}.json: no angle, -90 to 90 degrees')
        told["elevation"] = float(elevation)
    if not isinstance(annotations, dict) or not all(map(_is_number, annotations.values())):
        raise ValueError(f'"annotations" in {path.stem}.json are not numbers by name')
    if annotations:
        told["annotations"] = annotations
    return told


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _table_beside(path: Path) -> dict[str, Any]:
    table = path.with_suffix(".json")
    if not table.is_file():
        return {}
    content = json.loads(table.read_text())
    if not isinstance(content, dict) or content.keys().isdisjoint(TOLD):
        raise ValueError(f"{table.name} is no json object with one of {', '.join(TOLD)}")
    return content
