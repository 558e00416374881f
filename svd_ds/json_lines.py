"""JSON lines files, read and rewritten even if a killed writer left them damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svd_ds.fsync_io import keep_damaged_copy, replace_text
from svd_ds.small_files import read_regular


@dataclass(frozen=True)
class JsonLines:
    """Rows of a JSON lines file."""

    rows: list[dict[str, Any]]
    damage: str | None
    """Sentence about lines that cannot be read; None if all can be read."""


def read_json_lines(
    path: Path, valid: Callable[[dict[str, Any]], bool] = lambda row: True, skip_bad: bool = False
) -> JsonLines:
    """Parse a file with a JSON object on each line; a missing file has no rows.

    A killed writer or a power cut may leave an unreadable tail: it is left out and reported in `damage`.

    Args:
        valid: returns True for an object with the fields of a row; any other counts as unreadable.
        skip_bad: also leave out unreadable lines that readable ones follow, and report them in `damage`.

    Raises:
        ValueError: a line that readable lines follow is unreadable, and `skip_bad` is not set; the message
            names file and line.
        OSError: the file cannot be read.
    """
    lines = read_regular(path).split(b"\n") if path.exists() else []
    while lines and not lines[-1]:
        lines.pop()
    rows: list[dict[str, Any]] = []
    bad: list[int] = []
    is_tail = True
    for number, line in enumerate(lines, 1):
        row = _json_object(line)
        if row is None or not valid(row):
            bad.append(number)
            continue
        is_tail = not bad
        rows.append(row)
    if not bad:
        return JsonLines(rows, None)
    if is_tail:
        return JsonLines(
            rows, f"{path} is unreadable from line {bad[0]} on: what it had after that line is lost"
        )
    if not skip_bad:
        raise ValueError(f"{path} is damaged: line {bad[0]} cannot be read, and readable ones follow")
    which = "line" if len(bad) == 1 else f"{len(bad)} lines, the first is line"
    return JsonLines(rows, f"{path} is damaged: {which} {bad[0]} cannot be read, and is left out")


def rewrite_json_lines(
    path: Path,
    keep: Callable[[dict[str, Any]], bool],
    valid: Callable[[dict[str, Any]], bool] = lambda row: True,
) -> JsonLines:
    """Reduce a JSON lines file to the rows that `keep` accepts, atomically.

    If some lines cannot be read, the file is copied first, and `damage` names the copy.

    Args:
        keep: returns True for rows to keep.
        valid: see `read_json_lines`.

    Returns:
        The rows that were kept.

    Raises:
        OSError: the file cannot be read or written; the message names it.
    """
    found = read_json_lines(path, valid, skip_bad=True)
    damage = found.damage and f"{found.damage}; it was kept as {keep_damaged_copy(path)}"
    rows = [row for row in found.rows if keep(row)]
    if path.exists():
        replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return JsonLines(rows, damage)


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
