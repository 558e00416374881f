"""Small files of unknown origin, read within bounds: regular files, of a size that such a file may have.

A folder from a stranger may hold a pipe, on which a reader waits forever, a link to a device without an end,
or a text that grows as it is parsed.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import yaml

MAX_JSON = 2**26
"""Bytes. The index of a large model's weights has a hundredth of it."""
MAX_YAML = 2**20
"""Bytes. The config of a run has a hundredth of it."""


class _PlainLoader(yaml.SafeLoader):
    """A YAML loader without aliases: a few lines of them stand for more values than fit in memory. svd_ds
    writes none."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1} refers to an anchor")
        return super().compose_node(parent, index)


def read_regular(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file of at most so many bytes.

    Raises:
        ValueError: it is a pipe or a device, or larger; the message names it.
        OSError: the file cannot be read.
    """
    # Without O_NONBLOCK the open itself waits for somebody who writes into a pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        check_regular(path, status)
        if most is not None and status.st_size > most:
            raise ValueError(f"{path} has {status.st_size} bytes, and such a file may have {most}")
        return file.read()


def check_regular(path: Path, status: os.stat_result | None = None) -> None:
    """Raises ValueError where `path`, links followed, is neither a regular file nor a folder."""
    mode = (status or os.stat(path)).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{path} is no regular file, but a pipe or a device")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: the content is no JSON, or too large; the message names the file.
        OSError: the file cannot be read.
    """
    content = read_regular(path, MAX_JSON)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is no JSON ({_reason(error)})") from error


def read_yaml(path: Path) -> Any:
    """Parse a YAML file of plain values: no objects are constructed, and no aliases followed.

    Raises:
        ValueError: the content is no such YAML, or too large; the message names the file.
        OSError: the file cannot be read.
    """
    content = read_regular(path, MAX_YAML)
    try:
        return _PlainLoader(content).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is no YAML ({_reason(error)})") from error


def is_number(value: object) -> bool:
    """Whether a value is an int or a float that a float can hold: neither a bool, nor NaN, nor infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
