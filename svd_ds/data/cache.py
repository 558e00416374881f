"""A folder of fetched files, shared by all processes of a machine.

It is a folder of our own inside the one that the user names, and holds a mark. Only files in it that have the
names which this module gives are ever removed. Whatever is removed meanwhile, a reader keeps its file: `open`
returns an open file, not a path.
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

FOLDER = "svd_ds-cache"
MARK = "CACHEDIR.TAG"
MARK_TEXT = """Signature: 8a477f597d28d172789f06886806bc55
# This folder is a cache of svd_ds (data.cache): its files shard-*, part-* and index-* may be removed.
# The mark is for backup programs: https://bford.info/cachedir/
"""
OURS = re.compile(r"(shard|part|index-[0-9a-f]{16})-[0-9a-f]{16}-[A-Za-z0-9_.-]{1,40}(~[A-Za-z0-9.-]+)?")
"""Names of the files that this module makes."""
STALE_SECONDS = 24 * 3600
"""Age at which an unfinished file is one that a killed process has left."""
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What file systems answer that offer no locks."""


@dataclass(frozen=True)
class FileCache:
    """Fetched files below a folder that the user names."""

    parent: Path
    max_bytes: int
    """Above it the shards that were read least recently are removed; 0 keeps all."""

    @property
    def folder(self) -> Path:
        return self.parent / FOLDER

    def store(self, name: str, content: bytes) -> Path:
        """Keep a small file, which is never removed, under its name and its content's hash.

        Raises:
            OSError, ValueError: as `open` does.
        """
        self._prepare()
        path = self.folder / f"index-{hashlib.sha256(content).hexdigest()[:16]}-{name}"
        if not path.exists() or path.stat().st_size != len(content):
            part = self.folder / f"part-{name}~{_process()}"
            part.write_bytes(content)
            os.replace(part, path)
        return path

    def open(self, name: str, num_bytes: int, fetch: Callable[[], Iterable[bytes]]) -> IO[bytes]:
        """Open a file of `num_bytes`, fetched first where it is not there; one process fetches it for all.

        Raises:
            ValueError: what is fetched has another size, or the folder is not a cache.
            OSError: the folder cannot be written.
        """
        path = self.folder / f"shard-{name}"
        found = _open_sound(path, num_bytes)
        if found is not None:
            return found
        self._prepare()
        part, file = self._open_part(self.folder / f"part-{name}")
        if (found := _open_sound(path, num_bytes)) is not None:
            # Another process has fetched it while this one waited for the lock.
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
                raise ValueError(f"it has {actual} bytes, and its index says {num_bytes}")
        except BaseException:
            part.unlink(missing_ok=True)
            file.close()
            raise
        with suppress(FileNotFoundError):  # Removed as stale: the open file is as good.
            os.replace(part, path)
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
        return file

    def _open_part(self, part: Path) -> tuple[Path, IO[bytes]]:
        """The unfinished file of this name, locked; one of this process's own where locks are not offered."""
        while True:
            file = _open_new(part)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                file.close()
                if error.errno not in NO_LOCKS:
                    raise
                part.unlink(missing_ok=True)
                part = part.with_name(f"{part.name}~{_process()}")
                return part, _open_new(part)
            # While this process waited for the lock, the file may have got its final name, or been removed.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(part, follow_symlinks=False)):
                    return part, file
            file.close()

    def _prepare(self) -> None:
        """Make the folder, with its mark.

        Raises:
            ValueError: there is a folder of that name that has no mark, and holds other files.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = self.folder / MARK
        if os.path.lexists(mark):
            return
        for name in os.listdir(self.folder):
            if name != MARK and not OURS.fullmatch(name):
                raise ValueError(
                    f"{self.folder} is no data cache: it holds {name!a}, and no {MARK}; name another "
                    "folder as data.cache"
                )
        with suppress(FileExistsError), open(mark, "x") as file:
            file.write(MARK_TEXT)

    def _evict(self, incoming: int) -> None:
        """Remove shards, those first that were read least recently, until `incoming` bytes have room."""
        if not self.max_bytes:
            return
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                removable = OURS.fullmatch(entry.name) and not entry.name.startswith("index-")
                if removable and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        found.append((entry.stat(follow_symlinks=False), entry.path))
        total = incoming + sum(status.st_size for status, _ in found)
        for status, path in sorted(found, key=lambda pair: pair[0].st_mtime_ns):
            unfinished = os.path.basename(path).startswith("part-")
            if unfinished and time.time() - status.st_mtime < STALE_SECONDS:
                continue
            if total > self.max_bytes or unfinished:
                with suppress(OSError):  # Another process was faster, or it is another user's.
                    os.unlink(path)
                    total -= status.st_size


def _open_sound(path: Path, num_bytes: int) -> IO[bytes] | None:
    """Open a fetched file; None where it is not there, or of another size, as of an earlier data set."""
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
    left = memoryview(block)
    while left:
        left = left[file.write(left) :]


def _process() -> str:
    return f"{re.sub(r'[^A-Za-z0-9-]', '-', socket.gethostname())}-{os.getpid()}-{threading.get_ident()}"
