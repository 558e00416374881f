"""Reading of small untrusted files: only regular files, up to a maximal size.

An untrusted folder may contain a pipe, on which a reader waits for ever, a link to an endless device, or a
text that expands as it is parsed.
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
"""Maximal size in bytes; the index of a large model's weights has a hundredth of it."""
MAX_YAML = 2**20
"""Maximal size in bytes; the config of a run has a hundredth of it."""


class _PlainLoader(yaml.SafeLoader):
    """YAML loader that refuses aliases: a few lines of aliases can expand to more values than fit in memory.
    svd_ds writes no aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1} refers to an anchor")
        return super().compose_node(parent, index)


def read_regular(path: Path, max_bytes: int | None = None) -> bytes:
    """Read a regular file of at most `max_bytes` bytes.

    Raises:
        ValueError: the path is a pipe or a device, or the file is larger; the message names it.
        OSError: the file cannot be read.
    """
    # Without O_NONBLOCK opening a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        check_regular(path, status)
        if max_bytes is not None and status.st_size > max_bytes:
            raise ValueError(f"{path} has {status.st_size} bytes: it must have at most {max_bytes}")
        return file.read()


def check_regular(path: Path, status: os.stat_result | None = None) -> None:
    """Check that `path`, links followed, is a regular file or a folder.

    Raises:
        ValueError: it is a pipe or a device.
    """
    mode = (status or os.stat(path)).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{path} is not a regular file, but a pipe or a device")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: the content is not JSON, or too large; the message names the file.
        OSError: the file cannot be read.
    """
    content = read_regular(path, MAX_JSON)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({_reason(error)})") from error


def read_yaml(path: Path) -> Any:
    """Parse a YAML file of plain values: no objects are constructed, and aliases are refused.

    Raises:
        ValueError: the content is not such YAML, or too large; the message names the file.
        OSError: the file cannot be read.
    """
    content = read_regular(path, MAX_YAML)
    try:
        return _PlainLoader(content).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not YAML ({_reason(error)})") from error


def is_number(value: object) -> bool:
    """Return True for a finite int or float; bool does not count."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
