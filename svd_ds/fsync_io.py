"""Durable files: on disk, and not only in the page cache, before a caller goes on; and readable errors.

Every small file of a run is written here; small_files.py and json_lines.py read. A file is replaced
atomically: a reader sees the old content or the new one, and a power cut leaves one of the two. An error
names the file. What is damaged all the same is not deleted: `set_aside` keeps a copy next to the file.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""What some FUSE and network file systems answer to an fsync that they do not offer."""
NO_FOLDER_FSYNC = (*NO_FSYNC, errno.EBADF, errno.EISDIR, errno.EACCES)
"""The same for a folder, which some cannot even open. PostgreSQL accepts them too (fd.c, fsync_fname_ext)."""


@contextmanager
def name_errors(path: Path) -> Iterator[None]:
    """Inside, an OSError that names no file, such as that of a full disk, becomes one that names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


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


def replace_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write or replace a safetensors file atomically and durably; on an error nothing of it is left.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    draft = path.with_name(path.name + ".new")
    try:
        write_tensors(draft, tensors, metadata)
        replace_file(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file durably, without atomicity: for files inside a folder that is renamed later.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with name_errors(path):
        path.write_text(text, encoding="utf-8")
    fsync_path(path)


def replace_text(path: Path, text: str) -> None:
    """Write or replace a file atomically and durably."""
    draft = path.with_name(path.name + ".new")
    write_text(draft, text)
    replace_file(draft, path)


def replace_bytes(path: Path, content: bytes) -> None:
    """Write or replace a file atomically and durably, even if several processes write the same file.

    Each process has a draft of its own, NAME.HOST-PID.part; on an error it is removed.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    draft = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.part")
    try:
        with name_errors(draft):
            draft.write_bytes(content)
        replace_file(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def create_text(path: Path, text: str) -> None:
    """Write a file durably unless there is one of its name: of several writers the first succeeds.

    On a file system without hard links a reader may see the file before it is whole.

    Raises:
        FileExistsError: there is one.
        OSError: the file cannot be written; the message names it.
    """
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_text(draft, text)
        # Unlike a rename, a link fails where there is a file.
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:
        if not draft.exists():
            raise
        # EPERM, ENOTSUP, ENOSYS, ...: gcsfuse, exFAT and some SMB servers have no hard links.
        _create_exclusively(path, text)
    finally:
        draft.unlink(missing_ok=True)
    fsync_path(path.parent)


def _create_exclusively(path: Path, text: str) -> None:
    file = path.open("x", encoding="utf-8")
    try:
        with file, name_errors(path):
            file.write(text)
        fsync_path(path)
    except OSError:
        path.unlink(missing_ok=True)
        raise


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
    accepted = NO_FOLDER_FSYNC if stat.S_ISDIR(os.stat(path).st_mode) else NO_FSYNC
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in accepted:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


class LineFile:
    """A file that lines are appended to. Each line is one write of the system, so a killed process leaves
    whole lines, and after an error, such as a full disk, nothing is left to be written by `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)

    def append(self, line: str) -> None:
        """Append a line; it is on disk once `fsync_path` has returned.

        Raises:
            OSError: the message names the file.
        """
        left = memoryview(line.encode("utf-8", "backslashreplace") + b"\n")
        with name_errors(self.path):
            while left:
                left = left[self._file.write(left) :]

    def append_row(self, row: Mapping[str, Any]) -> None:
        """Append a JSON object; raises as `append`."""
        self.append(json.dumps(row))

    def close(self) -> None:
        with name_errors(self.path):
            self._file.close()


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON object to a JSON lines file; raises as `LineFile.append`."""
    lines = LineFile(path)
    try:
        lines.append_row(row)
    finally:
        lines.close()


def set_aside(path: Path) -> Path:
    """Copy a damaged file to NAME.damaged-1 (or -2, ...) next to it, for a person to look at; returns the
    path of the copy. The damaged file stays: its owner replaces it."""
    number = 1
    while (copy := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    with name_errors(copy):
        shutil.copyfile(path, copy)
    fsync_path(copy)
    return copy
