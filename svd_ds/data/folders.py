"""Folders of a data set's files: local ones, and remote ones that are fetched from a URL to a cache."""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote

from svd_ds.cli import same_kind
from svd_ds.credentials import redact
from svd_ds.data.cache import FileCache
from svd_ds.data.sample import Shard

INDEX_NAME = "index.jsonl"
URL = re.compile(r"pipe:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)
FETCHED_NAME = re.compile(r"[\w.+=,][\w.+=, -]*(/[\w.+=,][\w.+=, -]*)*")
"""Pattern of safe file names, which a URL parser, a command line and (apart from blanks) a shell pass on
unchanged."""
PERCENT_DECODED = ("http:", "https:", "ftps:", "sftp:", "scp:", "file:")
"""URL schemes whose openers decode percent escapes such as %20."""
BLOCK_BYTES = 2**20
"""Number of bytes that are fetched at a time."""

OpenUrl = Callable[[str], IO[bytes]]
"""Opens a URL for reading; closing the file raises OSError if the transfer failed."""


@dataclass(frozen=True)
class Folder:
    """Folder of a data set's files on a local or mounted file system."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def location(self, file: str) -> str:
        """Return the path or URL of a file, for error messages."""
        return f"{self}/{file}"

    def check_name(self, name: str) -> None:
        """Check that the name of a shard is safe to open.

        `sample.check_local_name` has checked before that the file is inside the folder.

        Raises:
            ValueError: the name is not safe.
        """

    def index_path(self) -> Path:
        """Return the local path of the index, after fetching it from a URL.

        Raises:
            FileNotFoundError: the folder or its index is missing.
            OSError: the index cannot be fetched, but a retry may succeed.
            ValueError: the index cannot be fetched, and a retry would fail too.
        """
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no data folder {self}; tools/make_shards.py makes one")
        path = self.path / INDEX_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{self} has no {INDEX_NAME}; tools/make_shards.py writes it after the shards"
            )
        return path

    def check_shards(self, shards: Iterable[Shard]) -> None:
        """Check that all shards are complete.

        Raises:
            FileNotFoundError: a shard is missing.
            ValueError: a shard does not have the size that the index says.
        """
        for shard in shards:
            _check_shard(self.path / shard.name, shard.num_bytes)

    def open(self, shard: Shard) -> IO[bytes]:
        """Open a shard for reading, without a buffer: reads are scattered, and of known size.

        Raises:
            OSError: the shard cannot be opened or fetched.
            ValueError: the shard is not the file that was indexed.
        """
        return open(self.path / shard.name, "rb", buffering=0)


def open_folder(path: str, cache: str | None, cache_gb: float, open_url: OpenUrl) -> Folder:
    """Open a folder of a data set.

    Args:
        path: local path, or URL.
        cache: local folder to which the files at a URL are fetched (data.cache).
        cache_gb: largest size of the cache in GB (data.cache_gb); 0 is unlimited.
        open_url: opens a URL for reading.

    Raises:
        ValueError: `path` is a URL, and `cache` is None.
    """
    if not URL.match(path):
        return Folder(Path(path))
    if cache is None:
        raise ValueError(f"{path} is remote: data.cache must name a local folder for its files")
    return RemoteFolder(
        Path(cache), path.rstrip("/"), FileCache(Path(cache), math.ceil(cache_gb * 1e9)), open_url
    )


@dataclass(frozen=True)
class RemoteFolder(Folder):
    """Folder of a data set's files at a URL."""

    url: str
    """URL of the folder; the file name replaces `{}` in it, as in `pipe:ssh host cat /shards/{}`."""
    cache: FileCache
    open_url: OpenUrl

    def __str__(self) -> str:
        return self.url

    def location(self, file: str) -> str:
        """Return the URL of a file, quoted for a command and percent-encoded for some schemes."""
        if self.url.startswith("pipe:"):
            file = shlex.quote(file)
        elif self.url.lower().startswith(PERCENT_DECODED):
            file = quote(file)
        return self.url.replace("{}", file) if "{}" in self.url else f"{self.url}/{file}"

    def check_name(self, name: str) -> None:
        """Check that the name of a shard is safe in a URL, a command line and a shell.

        Raises:
            ValueError: the name is not safe.
        """
        # A command such as ssh passes the name on to another shell, without our quotes.
        if not FETCHED_NAME.fullmatch(name) or (self.url.startswith("pipe:") and " " in name):
            raise ValueError(
                f"shard name {name!a} is not fetched from {self.url}: it may have only letters, digits and "
                "._+=,-, and no part of it may begin with -"
            )

    def index_path(self) -> Path:
        """Fetch the index anew, since it may have changed.

        The local file is named after the hash of its content, so that an index that another run fetches later
        does not replace it.

        Raises:
            OSError: the index cannot be fetched, but a retry may succeed.
            ValueError: the index cannot be fetched, and a retry would fail too.
        """
        url = self.location(INDEX_NAME)
        with _fetch_errors(url):
            content = b"".join(self._blocks(url))
            return self.cache.store(_cache_name(url), content)

    def check_shards(self, shards: Iterable[Shard]) -> None:
        """Skip the check: shards are checked when they are fetched."""

    def open(self, shard: Shard) -> IO[bytes]:
        url = self.location(shard.name)
        with _fetch_errors(url):
            return self.cache.open(_cache_name(url), shard.num_bytes, lambda: self._blocks(url))

    def _blocks(self, url: str) -> Iterator[bytes]:
        with self.open_url(url) as stream:
            while block := stream.read(BLOCK_BYTES):
                yield block


def check_cache_size(sets: Sequence[tuple[Folder, Sequence[Shard]]], window: int, cache_gb: float) -> None:
    """Check that the cache is large enough for the shards that are read at the same time.

    Args:
        sets: folder and shards of each data set.
        window: number of shards of each data set that are read at the same time.
        cache_gb: largest size of the cache in GB (data.cache_gb); 0 is unlimited.

    Raises:
        ValueError: the cache is too small: almost every sample would fetch a shard.
    """
    needed = 0
    for folder, shards in sets:
        if isinstance(folder, RemoteFolder):
            needed += sum(sorted((shard.num_bytes for shard in shards), reverse=True)[:window])
    if 0 < cache_gb * 1e9 < needed:
        raise ValueError(
            f"data.cache_gb is {cache_gb:g}, and the {window} shards of each data set that are read "
            f"at the same time have {needed / 1e9:.3g} GB: it must be at least {needed * 1.01 / 1e9:.3g}, or "
            "0 to keep all shards"
        )


def _cache_name(url: str) -> str:
    """Return the name of a file in the cache, with a hash of its URL: shards of two data sets have equal
    names."""
    tail = re.sub(r"[^A-Za-z0-9_.-]", "_", redact(url))[-40:]
    return f"{hashlib.sha256(url.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}-{tail}"


@contextmanager
def _fetch_errors(url: str) -> Iterator[None]:
    """Add `url` to the errors that are raised in the context.

    Raises:
        OSError: an error after which a retry may help.
        ValueError: any other error.
    """
    try:
        yield
    except (MemoryError, AssertionError):
        raise
    except (OSError, ValueError, ImportError) as error:
        raise same_kind(error, f"{url} cannot be fetched: {error}") from error
    except Exception as error:
        # Every storage client has its own exceptions.
        raise OSError(f"{url} cannot be fetched: {type(error).__name__}: {error}") from error


def _check_shard(path: Path, num_bytes: int) -> None:
    """Check that a local shard exists and has `num_bytes` bytes; see `Folder.check_shards` for its errors."""
    if not path.is_file():
        raise FileNotFoundError(f"shard {path} is missing, but the index lists it")
    actual = path.stat().st_size
    if actual != num_bytes:
        cause = "it is truncated" if actual < num_bytes else "it is not the file that was indexed"
        raise ValueError(f"shard {path} has {actual} bytes, but the index says {num_bytes}: {cause}")
