"""Atomic and durable writes, with errors that name the file.

Durable: a file is on disk, and not only in the page cache, before its writer returns. Atomic: a reader, also
after a power cut, sees the old content or the new one. Every file of a run is written here; small_files.py
and json_lines.py read them. If a file is damaged all the same, `keep_damaged_copy` copies it before it is
replaced.
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
"""Errors of FUSE and network file systems that do not support fsync."""
NO_FOLDER_FSYNC = (*NO_FSYNC, errno.EBADF, errno.EISDIR, errno.EACCES)
"""The same for folders, which some cannot even open. PostgreSQL accepts them too (fd.c, fsync_fname_ext)."""


@contextmanager
def name_errors(path: Path) -> Iterator[None]:
    """Turn an OSError inside that names no file, such as that of a full disk, into one that names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file durably, without atomicity; missing folders are created.

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
    """Write or replace a safetensors file atomically and durably; on an error the draft is removed.

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
    """Write a file durably, without atomicity, such as one in a folder that is renamed later.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with name_errors(path):
        path.write_text(text, encoding="utf-8")
    fsync_path(path)


def replace_text(path: Path, text: str) -> None:
    """Write or replace a file atomically and durably.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    draft = path.with_name(path.name + ".new")
    write_text(draft, text)
    replace_file(draft, path)


def replace_bytes(path: Path, content: bytes) -> None:
    """Write or replace a file atomically and durably, even if several processes write the same file.

    Each process has its own draft, NAME.HOST-PID.part; on an error it is removed.

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
    """Write a file durably unless it exists: of several writers the first succeeds.

    On a file system without hard links a reader may see the file before it is complete.

    Raises:
        FileExistsError: the file exists.
        OSError: the file cannot be written; the message names it.
    """
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_text(draft, text)
        # Unlike a rename, a link fails if the file exists.
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
    """Rename a finished draft, a file or a folder, to its final name, atomically and durably.

    Raises:
        OSError: the message names the file.
    """
    for entry in (*draft.rglob("*"), draft):
        if entry.exists():  # a symbolic link may be broken
            fsync_path(entry)
    os.replace(draft, path)
    fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    """Wait until a file's content, or the entries of a folder, are on disk.

    A file system that does not support fsync is not an error; a failing disk is.

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
    """File to which lines are appended. Each line is one system call. Therefore a killed process leaves
    complete lines, and after an error such as a full disk `close` has nothing left to write."""

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
        """Append a JSON object; raises what `append` raises."""
        self.append(json.dumps(row))

    def close(self) -> None:
        """Close the file."""
        with name_errors(self.path):
            self._file.close()


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON object to a JSON lines file.

    Raises:
        OSError: the message names the file.
    """
    lines = LineFile(path)
    try:
        lines.append_row(row)
    finally:
        lines.close()


def keep_damaged_copy(path: Path) -> Path:
    """Copy a damaged file to NAME.damaged-1 (or -2, ...) next to it, for a person to inspect.

    The damaged file is left in place: its owner replaces it.

    Returns:
        Path of the copy.

    Raises:
        OSError: the copy cannot be written; the message names it.
    """
    number = 1
    while (copy := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    with name_errors(copy):
        shutil.copyfile(path, copy)
    fsync_path(copy)
    return copy
