"""Durable files: on disk, and not only in the page cache, before a caller goes on; and readable errors.

Every small file of a run (JSON, JSON lines, YAML) is written and read here. A file is replaced atomically: a
reader sees the old content or the new one, and a power cut leaves one of the two. An error names the file.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""What some FUSE and network file systems answer to an fsync that they do not offer."""


@dataclass(frozen=True)
class JsonLines:
    """The rows of a JSON lines file."""

    rows: list[dict[str, Any]]
    damage: str | None
    """One sentence about an unreadable tail, None where the whole file is readable."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and its folder, durably.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    fsync_path(path)


def write_text(path: Path, text: str) -> None:
    """Write a file durably, without atomicity: for files inside a folder that is renamed later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    fsync_path(path)


def replace_text(path: Path, text: str) -> None:
    """Write or replace a file atomically and durably."""
    draft = path.with_name(path.name + ".new")
    write_text(draft, text)
    replace_file(draft, path)


def replace_file(draft: Path, path: Path) -> None:
    """Rename a finished draft to its final name, atomically and durably."""
    fsync_path(draft)
    os.replace(draft, path)
    fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's entries.

    A file system that does not offer fsync is accepted; a disk that fails is not.

    Raises:
        OSError: the message names the path.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: the content is no JSON; the message names the file.
        OSError: the file cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is no JSON ({_reason(error)})") from error


def read_yaml(path: Path) -> Any:
    """Parse a YAML file, without any object construction.

    Raises:
        ValueError: the content is no YAML; the message names the file.
        OSError: the file cannot be read.
    """
    try:
        return yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is no YAML ({_reason(error)})") from error


def read_json_lines(path: Path) -> JsonLines:
    """Parse a file with a JSON object on each line; a missing file has no rows.

    A killed writer or a power cut may leave an unreadable tail: it is left out and reported in `damage`.

    Raises:
        ValueError: a line that readable lines follow is no JSON object; the message names file and line.
        OSError: the file cannot be read.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    while lines and not lines[-1]:
        lines.pop()
    rows: list[dict[str, Any]] = []
    bad: int | None = None
    for number, line in enumerate(lines, 1):
        row = _json_object(line)
        if row is None:
            bad = bad or number
        elif bad is not None:
            raise ValueError(f"{path} is damaged: line {bad} is no JSON object")
        else:
            rows.append(row)
    damage = (
        None
        if bad is None
        else f"{path} is unreadable from line {bad} on: what it had after that line is lost"
    )
    return JsonLines(rows, damage)


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
