"""Lists of a folder's files with captions: metadata.csv, metadata.jsonl, or videos.txt with prompts.txt."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from svd_ds.data.sidecar import CAPTION_KEYS, clean_text, decode_text, parse_captions, parse_json
from svd_ds.scalars import SAMPLE_FIELDS
from svd_ds.small_files import is_number

TABLES = ("metadata.csv", "metadata.jsonl")
NAME_COLUMNS = (
    *("file_name", "filename", "file", "video", "video_path", "file_path", "filepath", "path"),
    *("image", "image_path", "media", "media_path"),
)
"""Table columns that may contain the file name, in order of precedence; case is ignored, and blanks may
replace underscores."""
DELIMITERS = ",;\t|"
NAME_LISTS = ("videos.txt", "video.txt")
PROMPT_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
"""Files whose lines are the captions of the same lines of a list of names."""

Metadata = dict[str, Any]
"""Values of one file, in the layout of a json sidecar."""


@dataclass
class Listing:
    """Content of the lists in a folder."""

    rows: list[tuple[str, Metadata]] = field(default_factory=list)
    """(listed file name, its metadata); a file may have several rows."""
    lists: list[Path] = field(default_factory=list)
    """Paths of the lists themselves."""
    faults: dict[Path, list[str]] = field(default_factory=dict)
    """List -> one sentence for each row that cannot be used."""

    def fault_summaries(self) -> Iterator[tuple[Path, str]]:
        """Yield (list, one sentence about all of its unusable rows)."""
        for path, sentences in self.faults.items():
            others = f"; and {len(sentences) - 1} more rows like it" if len(sentences) > 1 else ""
            yield path, f"{sentences[0]}{others}"


def read_listing(folder: Path) -> Listing:
    """Read the lists in a folder.

    Raises:
        ValueError: a list of names and a list of prompts differ in length, so that lines cannot be matched.
    """
    listing = Listing()
    for path in (folder / name for name in TABLES):
        if path.is_file():
            listing.lists.append(path)
            faults: list[str] = []
            try:
                listing.rows += _table_rows(path, faults)
            except ValueError as error:
                faults.append(f"it cannot be read: {error}")
            if faults:
                listing.faults[path] = faults
    names = next((path for name in NAME_LISTS if (path := folder / name).is_file()), None)
    prompts = next((path for name in PROMPT_LISTS if (path := folder / name).is_file()), None)
    if names is not None and prompts is not None:
        listing.lists += [names, prompts]
        lines, captions = _lines(names), _lines(prompts)
        if len(lines) != len(captions):
            raise ValueError(
                f"{names} has {len(lines)} lines and {prompts} has {len(captions)}: the numbers must be equal"
            )
        listing.rows += [(name, {"caption": text}) for name, text in zip(lines, captions, strict=True)]
    return listing


class FileFinder:
    """Finds the existing files that listed names refer to."""

    def __init__(self, root: Path, names: Iterable[str]) -> None:
        """Index the files.

        Args:
            root: folder of the lists.
            names: paths of the existing files, relative to `root`.
        """
        self._root = root
        self._names = set(names)
        self._by_stem: dict[str, list[str]] = {}
        for name in self._names:
            self._by_stem.setdefault(os.path.splitext(name)[0], []).append(name)

    def find(self, listed: str) -> str | None:
        """Return the path of a listed file relative to the root; None if it does not exist.

        A listed path may be URL-encoded, have backslashes, lack its extension, or begin with the root's own
        name. An absolute path of another machine is matched by its longest suffix that exists.
        """
        for spelling in (listed, unquote(listed), listed.replace("\\", "/")):
            path = PurePosixPath(os.path.normpath(spelling))
            parts = path.parts
            absolute = path.is_absolute() or "\\" in listed or parts[:1] == (self._root.resolve().name,)
            # The longest suffix that exists counts.
            starts = range(len(parts)) if absolute else range(1)
            for start in starts:
                suffix = str(PurePosixPath(*parts[start:]))
                if suffix in self._names:
                    return suffix
                if len(found := self._by_stem.get(suffix, [])) == 1:
                    return found[0]
        return None


def merge_rows(rows: Sequence[Metadata]) -> Metadata:
    """Merge the rows of one file: all of their captions, and the first of the other values."""
    if len(rows) == 1:
        return rows[0]
    texts = [text for row in rows for text in parse_captions(row).values() if text]
    merged: Metadata = {}
    for row in reversed(rows):
        merged |= {key: value for key, value in row.items() if key.lower() not in CAPTION_KEYS}
    return merged | {"captions": list(dict.fromkeys(texts))}


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in clean_text(decode_text(path.read_bytes())).splitlines()]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _table_rows(path: Path, faults: list[str]) -> Iterator[tuple[str, Metadata]]:
    """Yield the usable rows, and add a sentence to `faults` for each of the others."""
    text = clean_text(decode_text(path.read_bytes()))
    for number, row in _csv_rows(text, faults) if path.suffix == ".csv" else _json_rows(text, faults):
        names = {key.strip().lower().replace(" ", "_"): key for key in row}
        column = next((names[name] for name in NAME_COLUMNS if name in names), None)
        value = row[column] if column is not None else None
        if not isinstance(value, str) or not value.strip():
            faults.append(f"row {number} names no file: it needs one of {', '.join(NAME_COLUMNS)}")
            continue
        values = {key: value for key, value in row.items() if key != column}
        metadata = {
            key.strip(): value
            for key, value in values.items()
            if key.strip().lower() in (*CAPTION_KEYS, *SAMPLE_FIELDS)
        }
        given = values.get("annotations")
        numbers = dict(given) if isinstance(given, dict) else {}
        others = {
            key: value for key, value in values.items() if key.strip() not in (*metadata, "annotations")
        }
        numbers |= {key: _number(value) for key, value in others.items()}
        if numbers := {key: value for key, value in numbers.items() if value is not None}:
            metadata["annotations"] = numbers
        metadata |= {field: _number(metadata[field]) for field in SAMPLE_FIELDS if field in metadata}
        yield value.strip(), metadata


def _csv_rows(text: str, faults: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 1 after the header, values by column)."""
    header = text.lstrip().split("\n", 1)[0]
    delimiter = max(DELIMITERS, key=header.count) if header else ","
    # Blanks before a quote are not part of a cell; before other text they may belong to a caption.
    csv_format: dict[str, Any] = {"delimiter": delimiter, "skipinitialspace": f'{delimiter} "' in text}
    # An unclosed quote swallows all text after it.
    open_quote = _has_open_quote(text, csv_format)
    reader = csv.reader(io.StringIO(text, newline=""), **csv_format)
    try:
        cells = [row for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        faults.append(f"it cannot be read from line {reader.line_num} on: {error}")
        return
    names, rows = (cells[0], cells[1:]) if cells else ([], [])
    for number, row in enumerate(rows, 1):
        if open_quote and number == len(rows):
            faults.append(f"row {number} has an unclosed quote: the rest of the file is not read")
            return
        if len(row) > len(names) and names[-1].strip().lower() in CAPTION_KEYS:
            # An unquoted caption with commas.
            row = [*row[: len(names) - 1], delimiter.join(row[len(names) - 1 :])]
        if len(row) > len(names):
            faults.append(f"row {number} has {len(row)} cells, but the header has {len(names)}")
            continue
        yield number, dict(zip(names, row, strict=False))


def _has_open_quote(text: str, csv_format: Mapping[str, Any]) -> bool:
    try:
        for _ in csv.reader(io.StringIO(text, newline=""), **csv_format, strict=True):
            pass
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False


def _json_rows(text: str, faults: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.encode("utf-8", "surrogatepass"), f"line {number}")
        except ValueError as error:
            faults.append(str(error))
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            faults.append(f"row {number} is not an object")


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if is_number(value) else None
