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
from svd_ds.small_files import is_number

TABLES = ("metadata.csv", "metadata.jsonl")
NAME_COLUMNS = (
    *("file_name", "filename", "file", "video", "video_path", "file_path", "filepath", "path"),
    *("image", "image_path", "media", "media_path"),
)
"""Columns of a table that may name the file, the preferred ones first; in upper or lower case, with blanks or
underscores."""
DELIMITERS = ",;\t|"
NAME_LISTS = ("videos.txt", "video.txt")
PROMPT_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
"""A line of such a list belongs to the same line of a list of names."""

Row = dict[str, Any]
"""What a sidecar json of the file would hold."""


@dataclass
class Listing:
    """What the lists in a folder say."""

    rows: list[tuple[str, Row]] = field(default_factory=list)
    """(name of a file as it is listed, what is said of it); a file may have several."""
    lists: list[Path] = field(default_factory=list)
    faults: dict[Path, list[str]] = field(default_factory=dict)
    """List -> a sentence for each row that cannot be used."""

    def reasons(self) -> Iterator[tuple[Path, str]]:
        """(list, one sentence about all of its rows that cannot be used)."""
        for path, sentences in self.faults.items():
            more = f"; so it is with {len(sentences) - 1} more" if len(sentences) > 1 else ""
            yield path, f"{sentences[0]}{more}"


def read_listing(folder: Path) -> Listing:
    """Read the lists in a folder.

    Raises:
        ValueError: a list of names and one of prompts differ in length: no line says which is missing.
    """
    listing = Listing()
    for path in (folder / name for name in TABLES):
        if path.is_file():
            listing.lists.append(path)
            faults: list[str] = []
            try:
                listing.rows += _rows(path, faults)
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
                f"{names} has {len(lines)} lines and {prompts} has {len(captions)}: they must be as many"
            )
        listing.rows += [(name, {"caption": text}) for name, text in zip(lines, captions, strict=True)]
    return listing


class Finder:
    """Finds the files that lists mean, among those that there are."""

    def __init__(self, root: Path, names: Iterable[str]) -> None:
        """`names`: paths of the files below `root`."""
        self._root = root
        self._names = set(names)
        self._by_stem: dict[str, list[str]] = {}
        for name in self._names:
            self._by_stem.setdefault(os.path.splitext(name)[0], []).append(name)

    def find(self, listed: str) -> str | None:
        """The file's path below the root; None where there is none.

        A path may be URL-encoded, have backslashes or lack its extension, and it may begin with the root's
        own name. Of an absolute path of another machine the longest end that fits counts.
        """
        for spelling in (listed, unquote(listed), listed.replace("\\", "/")):
            path = PurePosixPath(os.path.normpath(spelling))
            parts = path.parts
            absolute = path.is_absolute() or "\\" in listed or parts[:1] == (self._root.resolve().name,)
            ends = range(len(parts)) if absolute else range(1)
            for begin in ends:
                end = str(PurePosixPath(*parts[begin:]))
                if end in self._names:
                    return end
                if len(found := self._by_stem.get(end, [])) == 1:
                    return found[0]
        return None


def merged(rows: Sequence[Row]) -> Row:
    """What all rows of one file say: all of their captions, and of other values the first."""
    if len(rows) == 1:
        return rows[0]
    texts = [text for row in rows for text in parse_captions(row).values() if text]
    about: Row = {}
    for row in reversed(rows):
        about |= {key: value for key, value in row.items() if key.lower() not in CAPTION_KEYS}
    return about | {"captions": list(dict.fromkeys(texts))}


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in clean_text(decode_text(path.read_bytes())).splitlines()]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _rows(path: Path, faults: list[str]) -> Iterator[tuple[str, Row]]:
    """The rows that can be used; a sentence in `faults` for each other."""
    text = clean_text(decode_text(path.read_bytes()))
    for number, row in _csv_rows(text, faults) if path.suffix == ".csv" else _json_rows(text, faults):
        names = {key.strip().lower().replace(" ", "_"): key for key in row}
        column = next((names[name] for name in NAME_COLUMNS if name in names), None)
        value = row[column] if column is not None else None
        if not isinstance(value, str) or not value.strip():
            faults.append(f"row {number} names no file: it needs one of {', '.join(NAME_COLUMNS)}")
            continue
        rest = {key: value for key, value in row.items() if key != column}
        about = {
            key.strip(): value
            for key, value in rest.items()
            if key.strip().lower() in (*CAPTION_KEYS, "elevation")
        }
        given = rest.get("annotations")
        numbers = dict(given) if isinstance(given, dict) else {}
        others = {key: value for key, value in rest.items() if key.strip() not in (*about, "annotations")}
        numbers |= {key: _number(value) for key, value in others.items()}
        if numbers := {key: value for key, value in numbers.items() if value is not None}:
            about["annotations"] = numbers
        if "elevation" in about:
            about["elevation"] = _number(about["elevation"])
        yield value.strip(), about


def _csv_rows(text: str, faults: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows by the header's names, counted from 1 after it."""
    header = text.lstrip().split("\n", 1)[0]
    delimiter = max(DELIMITERS, key=header.count) if header else ","
    # Blanks before a quote are no part of a cell; before other text they may be those of a caption.
    csv_format: dict[str, Any] = {"delimiter": delimiter, "skipinitialspace": f'{delimiter} "' in text}
    # A quote that is never closed swallows all that follows it.
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
            faults.append(f"row {number} has a quote that is never closed, and what follows is not read")
            return
        if len(row) > len(names) and names[-1].strip().lower() in CAPTION_KEYS:
            # A caption with commas that nobody quoted.
            row = [*row[: len(names) - 1], delimiter.join(row[len(names) - 1 :])]
        if len(row) > len(names):
            faults.append(f"row {number} has {len(row)} cells, and the header {len(names)}")
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
            faults.append(f"row {number} is no object")


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if is_number(value) else None
