"""Local cache of fetched files, shared by all processes of a machine.

The cache is a sub-folder of the folder that the user names, marked by a CACHEDIR.TAG. Only files with the
names that this module gives are ever removed. `open` returns an open file, not a path: a reader keeps its
file even if another process removes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from svd_ds.fsync_io import replace_file

FOLDER = "svd_ds-cache"
MARK = "CACHEDIR.TAG"
MARK_TEXT = """Signature: 8a477f597d28d172789f06886806bc55
# This folder is a cache of svd_ds (data.cache): its files shard-*, part-* and index-* may be removed.
# The mark is for backup programs: https://bford.info/cachedir/
"""
FILE_NAME = re.compile(r"(shard|part|index-[0-9a-f]{16})-[0-9a-f]{16}-[A-Za-z0-9_.-]{1,40}(~[A-Za-z0-9.-]+)?")
"""Pattern of the names of the files that this module writes."""
STALE_SECONDS = 24 * 3600
"""Age in seconds after which an unfinished file is assumed to be the remainder of a killed process."""
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""Error numbers of file systems that have no locks."""


@dataclass(frozen=True)
class FileCache:
    """Fetched files in a sub-folder of a folder that the user names."""

    parent: Path
    """Folder that the user names (data.cache)."""
    max_bytes: int
    """Size above which the least recently read shards are removed; 0 keeps all."""

    @property
    def folder(self) -> Path:
        """Folder of the fetched files."""
        return self.parent / FOLDER

    def store(self, name: str, content: bytes) -> Path:
        """Store a small file, which is never removed, under its name and the hash of its content.

        Returns:
            The path of the stored file.

        Raises:
            ValueError: the folder is not a cache.
            OSError: the folder cannot be written.
        """
        self._prepare()
        path = self.folder / f"index-{hashlib.sha256(content).hexdigest()[:16]}-{name}"
        if not path.exists() or path.stat().st_size != len(content):
            part = self.folder / f"part-{name}~{_thread_name()}"
            part.write_bytes(content)
            replace_file(part, path)
        return path

    def open(self, name: str, num_bytes: int, fetch: Callable[[], Iterable[bytes]]) -> IO[bytes]:
        """Open a cached file, after fetching it if it is missing; one process fetches it for all.

        Args:
            name: name of the file in the cache.
            num_bytes: its size; a cached file of another size is fetched again.
            fetch: yields the content in blocks.

        Raises:
            ValueError: the fetched content has another size, or the folder is not a cache.
            OSError: the folder cannot be written.
        """
        path = self.folder / f"shard-{name}"
        found = _open_complete(path, num_bytes)
        if found is not None:
            return found
        self._prepare()
        part, file = self._open_part(self.folder / f"part-{name}")
        if (found := _open_complete(path, num_bytes)) is not None:
            # Another process fetched it while this one waited for the lock.
            part.unlink(missing_ok=True)
            file.close()
            return found
        try:
            file.truncate(0)
            os.utime(file.fileno())
            self._evict(num_bytes)
            for block in fetch():
                _write(file, block)
            if (actual := file.tell()) != num_bytes:
                raise ValueError(f"it has {actual} bytes, but its index says {num_bytes}")
        except BaseException:
            part.unlink(missing_ok=True)
            file.close()
            raise
        # Not fsynced: a shard has gigabytes and can be fetched again, and its size is checked when it is
        # opened.
        with suppress(FileNotFoundError):  # Removed as stale; the open file is still readable.
            os.replace(part, path)
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
        return file

    def _open_part(self, part: Path) -> tuple[Path, IO[bytes]]:
        """Open and lock the unfinished file `part`; on a file system without locks, open a file that only
        this thread uses.

        Returns:
            The path of the file, and the open file.
        """
        while True:
            file = _open_new(part)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                file.close()
                if error.errno not in NO_LOCKS:
                    raise
                part.unlink(missing_ok=True)
                part = part.with_name(f"{part.name}~{_thread_name()}")
                return part, _open_new(part)
            # While this process waited for the lock, the file may have been renamed or removed.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(part, follow_symlinks=False)):
                    return part, file
            file.close()

    def _prepare(self) -> None:
        """Create the folder with its CACHEDIR.TAG.

        Raises:
            ValueError: the folder exists, has no CACHEDIR.TAG and holds other files.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = self.folder / MARK
        if os.path.lexists(mark):
            return
        for name in os.listdir(self.folder):
            if name != MARK and not FILE_NAME.fullmatch(name):
                raise ValueError(
                    f"{self.folder} is not a data cache: it holds {name!a}, but no {MARK}; set data.cache to "
                    "another folder"
                )
        with suppress(FileExistsError), open(mark, "x") as file:
            file.write(MARK_TEXT)

    def _evict(self, incoming: int) -> None:
        """Remove shards, the least recently read first, until `incoming` more bytes fit."""
        if not self.max_bytes:
            return
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                removable = FILE_NAME.fullmatch(entry.name) and not entry.name.startswith("index-")
                if removable and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        found.append((entry.stat(follow_symlinks=False), entry.path))
        total = incoming + sum(status.st_size for status, _ in found)
        for status, path in sorted(found, key=lambda pair: pair[0].st_mtime_ns):
            unfinished = os.path.basename(path).startswith("part-")
            if unfinished and time.time() - status.st_mtime < STALE_SECONDS:
                continue
            if total > self.max_bytes or unfinished:
                with suppress(OSError):  # Another process was faster, or the file belongs to another user.
                    os.unlink(path)
                    total -= status.st_size


def _open_complete(path: Path, num_bytes: int) -> IO[bytes] | None:
    """Open a fetched file; None if it is missing or has another size (a shard of an earlier data set)."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise
    if os.fstat(file.fileno()).st_size != num_bytes:
        file.close()
        return None
    with suppress(OSError):
        os.utime(file.fileno())
    return file


def _open_new(part: Path) -> IO[bytes]:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(part, flags, 0o644), "r+b", buffering=0)


def _write(file: IO[bytes], block: bytes) -> None:
    unwritten = memoryview(block)
    while unwritten:
        unwritten = unwritten[file.write(unwritten) :]


def _thread_name() -> str:
    """Return a name of this thread that is unique among the machines that share a folder."""
    return f"{re.sub(r'[^A-Za-z0-9-]', '-', socket.gethostname())}-{os.getpid()}-{threading.get_ident()}"
