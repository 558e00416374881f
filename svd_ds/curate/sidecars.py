"""Sidecar files next to a raw file: captions, annotations, scalars."""

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
from svd_ds.scalars import SAMPLE_FIELDS
from svd_ds.small_files import is_number

FILE_NAME_CAPTIONER = "name"
"""Captioner name of a file without a caption, whose file name is used as the caption."""
JSON = ".json"
SUFFIXES = (JSON, *(f".{name}" for name in TEXTS))


class FolderListings:
    """Tests whether files exist, with one listing of each folder: a system call for each spelling of a
    sidecar is slow on a network file system. Files that are created after the first query of their folder are
    not seen."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}

    def is_file(self, path: str) -> bool:
        """Return True if `path` is a regular file."""
        folder, name = os.path.split(path)
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder or "."))
            except OSError:
                self._names[folder] = frozenset()
        return name in self._names[folder] and os.path.isfile(path)


def find_sidecars(path: Path, is_file: Callable[[str], bool] = os.path.isfile) -> list[Path]:
    """Return the sidecars of clip.mp4, such as clip.txt or clip.mp4.txt, in order of precedence."""
    return [found for suffix in SUFFIXES if (found := _find_sidecar(path, suffix, is_file)) is not None]


def _find_sidecar(path: Path, suffix: str, is_file: Callable[[str], bool]) -> Path | None:
    for spelling in (suffix, suffix.upper(), suffix.title()):
        for stem in (os.path.splitext(path)[0], str(path)):
            if is_file(stem + spelling):
                return Path(stem + spelling)
    return None


def read_metadata(path: Path, listed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the captions, annotations and scalars of a raw file, in the layout of a sample's json.

    A json sidecar may contain captions, annotations (svd_ds/data/sidecar.py has the rules) and the fields of
    scalar conditions (svd_ds/scalars.py), such as "elevation"; a text sidecar is a caption. The captions of
    the first source that has any count: the sidecars in order of precedence, then `listed`, then the file
    name.

    Args:
        path: the raw file.
        listed: the file's row in a list of the folder's files (svd_ds/curate/listing.py).

    Raises:
        ValueError: a sidecar is unreadable and no other source has a caption, or a scalar is out of range.
    """
    row = dict(listed or {})
    content: Any = {}
    captions: dict[str, str] = {}
    damage: ValueError | None = None
    for sidecar in find_sidecars(path):
        try:
            data = sidecar.read_bytes()
            if sidecar.suffix.lower() == JSON:
                content = parse_json(data, clean_text(sidecar.name))
                found = parse_captions(content)
            else:
                found = {DEFAULT_CAPTIONER: " ".join(decode_caption(data).split())}
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
        captions = {FILE_NAME_CAPTIONER: re.sub(r"[\W_]+", " ", clean_text(path.stem)).strip()}
    metadata: dict[str, Any] = {"captions": captions}

    fields = row | content if isinstance(content, dict) else row
    for field, scalar in SAMPLE_FIELDS.items():
        if (value := fields.get(field)) is not None:
            if not is_number(value) or scalar.check(value):
                name, bounds = clean_text(path.with_suffix(JSON).name), f"{scalar.low:g} to {scalar.high:g}"
                unit = f" {scalar.unit}" if scalar.unit else ""
                raise ValueError(f'"{field}" is {value!r} in {name}: it must be from {bounds}{unit}')
            metadata[field] = float(value)
    annotations = parse_annotations(row)[0] | parse_annotations(content)[0]
    if annotations:
        metadata["annotations"] = annotations
    return metadata
