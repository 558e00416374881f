"""Lists of a folder's files with captions: metadata.csv, metadata.jsonl, or videos.txt with prompts.txt."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from svd_ds.data.sidecar import CAPTION_KEYS, clean_text, decode_text, is_number, parse_json

TABLES = ("metadata.csv", "metadata.jsonl")
NAME_COLUMNS = ("file_name", "video", "path", "file", "image", "video_path")
"""Columns of a table that may name the file, the preferred ones first."""
NAME_LISTS = ("videos.txt", "video.txt")
PROMPT_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
"""A line of such a list belongs to the same line of a list of names."""

Listed = dict[str, dict[str, Any]]
"""File's path below the folder -> what a sidecar json of it would hold."""


def read_listing(folder: Path) -> tuple[Listed, list[Path]]:
    """What the lists in a folder say of its files, and the lists themselves.

    Raises:
        ValueError: a list cannot be read; the message names it, and the line.
    """
    listed: Listed = {}
    used: list[Path] = []
    for path in (folder / name for name in TABLES):
        if path.is_file():
            listed |= dict(_rows(path))
            used.append(path)
    names = next((path for name in NAME_LISTS if (path := folder / name).is_file()), None)
    prompts = next((path for name in PROMPT_LISTS if (path := folder / name).is_file()), None)
    if names is not None and prompts is not None:
        used += [names, prompts]
        lines, captions = _lines(names), _lines(prompts)
        if len(lines) != len(captions):
            raise ValueError(
                f"{names} has {len(lines)} lines and {prompts} has {len(captions)}: they must be as many"
            )
        listed |= {name: {"caption": caption} for name, caption in zip(lines, captions, strict=True)}
    return listed, used


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in _text(path).splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = _text(path)
    if path.suffix == ".csv":
        rows: list[Any] = list(csv.DictReader(io.StringIO(text, newline="")))
    else:
        rows = [_json(path, i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    for number, row in enumerate(rows, 1):
        column = next((key for key in NAME_COLUMNS if isinstance(row, dict) and row.get(key)), None)
        if column is None or not isinstance(row[column], str):
            raise ValueError(
                f"row {number} of {path} names no file: it needs one of {', '.join(NAME_COLUMNS)}"
            )
        rest = {key: value for key, value in row.items() if key != column and isinstance(key, str)}
        about = {key: value for key, value in rest.items() if key.lower() in (*CAPTION_KEYS, "elevation")}
        given = rest.get("annotations")
        numbers = dict(given) if isinstance(given, dict) else {}
        numbers |= {key: _number(value) for key, value in rest.items() if key not in (*about, "annotations")}
        if numbers := {key: value for key, value in numbers.items() if value is not None}:
            about["annotations"] = numbers
        if "elevation" in about:
            about["elevation"] = _number(about["elevation"])
        yield row[column].strip(), about


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if is_number(value) else None


def _json(path: Path, number: int, line: str) -> Any:
    try:
        return parse_json(line.encode("utf-8", "surrogatepass"))
    except ValueError as error:
        raise ValueError(f"line {number} of {path}: {error}") from error


def _text(path: Path) -> str:
    try:
        return clean_text(decode_text(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
