"""Files that are on disk, and not only said to be, when a machine loses its power."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, and the folder that it is in. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    sync(path)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    sync(path)


def replace_text(path: Path, text: str) -> None:
    """Write a file of which a reader sees all that was there before or all that is new."""
    draft = path.with_name(path.name + ".new")
    write_text(draft, text)
    os.replace(draft, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
