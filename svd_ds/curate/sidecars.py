"""What the files next to a raw file say of it: captions, annotations, elevation."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from svd_ds.data.sidecar import (
    DEFAULT_CAPTIONER,
    TEXTS,
    clean_text,
    decode_caption,
    parse_annotations,
    parse_captions,
    parse_json,
)
from svd_ds.small_files import is_number

FILE_NAME = "name"
"""The captioner of a file that has no caption: its name stands in."""
JSON = ".json"
SUFFIXES = (JSON, *(f".{name}" for name in TEXTS))


class FolderListings:
    """Tells which files there are from one listing of each folder: a question for each spelling of a sidecar
    is slow on a network file system. It does not see what is written after it was first asked."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}

    def is_file(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder or "."))
            except OSError:
                self._names[folder] = frozenset()
        return name in self._names[folder] and os.path.isfile(path)


def sidecars_of(path: Path, is_file: Callable[[str], bool] = os.path.isfile) -> list[Path]:
    """The files that say something of clip.mp4: clip.txt or clip.mp4.txt; those first that count first."""
    return [found for suffix in SUFFIXES if (found := _beside(path, suffix, is_file)) is not None]


def _beside(path: Path, suffix: str, is_file: Callable[[str], bool]) -> Path | None:
    for spelling in (suffix, suffix.upper(), suffix.title()):
        for stem in (os.path.splitext(path)[0], str(path)):
            if is_file(stem + spelling):
                return Path(stem + spelling)
    return None


def told_of(path: Path, listed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Captions, and what else is said of a raw file, as a sample's json holds it.

    A json next to the file may hold captions, annotations (svd_ds/data/sidecar.py has the rules) and
    "elevation", the camera's in degrees; a text holds a caption; `listed` is the file's row in a list of the
    folder's files. Captions come from the first of these that has any, else the file's own name is one.

    Raises:
        ValueError: a file next to it is unreadable and no other has a caption, or the elevation is no angle.
    """
    row = dict(listed or {})
    about: Any = {}
    captions: dict[str, str] = {}
    damage: ValueError | None = None
    for sidecar in sidecars_of(path):
        try:
            content = sidecar.read_bytes()
            if sidecar.suffix.lower() == JSON:
                about = parse_json(content, clean_text(sidecar.name))
                found = parse_captions(about)
            else:
                found = {DEFAULT_CAPTIONER: " ".join(decode_caption(content).split())}
        except ValueError as error:
            damage = damage or error
            continue
        if not any(captions.values()):
            captions = found
    if not any(captions.values()):
        captions = parse_captions(row)
    if not any(captions.values()):
        if damage is not None:
            raise damage
        captions = {FILE_NAME: re.sub(r"[\W_]+", " ", clean_text(path.stem)).strip()}
    told: dict[str, Any] = {"captions": captions}

    elevation = (row | about if isinstance(about, dict) else row).get("elevation")
    if elevation is not None:
        if not is_number(elevation) or not -90 <= elevation <= 90:
            name = clean_text(path.with_suffix(JSON).name)
            raise ValueError(f'"elevation" is {elevation!r} in {name}: no angle, -90 to 90 degrees')
        told["elevation"] = float(elevation)
    annotations = parse_annotations(row)[0] | parse_annotations(about)[0]
    if annotations:
        told["annotations"] = annotations
    return told
