"""Where the files of a data set are: in a folder that is mounted here, or at a URL, fetched to a cache."""

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
"""Names that neither a shell (but for blanks), nor a URL parser, nor a command's options read another way."""
PERCENT_DECODED = ("http:", "https:", "ftps:", "sftp:", "scp:", "file:")
"""Schemes whose openers decode %20 and the like."""
BLOCK = 2**20
"""Bytes that are fetched at once."""

OpenUrl = Callable[[str], IO[bytes]]
"""Opens a URL for reading; closing it raises OSError where the transfer has failed."""


@dataclass(frozen=True)
class Folder:
    """A data set's files, on a file system that is mounted here. remote.py has those that are fetched."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def name(self, file: str) -> str:
        """A file's path, or URL, as errors name it."""
        return f"{self}/{file}"

    def check_name(self, name: str) -> None:
        """Check the name of a shard, beyond that it lies within the folder.

        Raises:
            ValueError: a file of that name must not be opened.
        """

    def index(self) -> Path:
        """The local path of the index.

        Raises:
            FileNotFoundError: there is none.
        """
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no data folder {self}; tools/make_shards.py makes one")
        path = self.path / INDEX_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{self} has no {INDEX_NAME}; tools/make_shards.py writes it at its end")
        return path

    def check_shards(self, shards: Iterable[Shard]) -> None:
        """Raises FileNotFoundError or ValueError where one is missing or cut short."""
        for shard in shards:
            _check_shard(self.path / shard.name, shard.num_bytes)

    def open(self, shard: Shard) -> IO[bytes]:
        """Open a shard for reading, unbuffered: what is read is scattered, and each part is wanted whole.

        Raises:
            OSError: it cannot be opened.
            ValueError: it is not the file that was indexed.
        """
        return open(self.path / shard.name, "rb", buffering=0)


def open_folder(path: str, cache: str | None, cache_gb: float, open_url: OpenUrl) -> Folder:
    """The files at a local path, or at a URL, from which they are fetched to `cache`.

    Raises:
        ValueError: `path` is a URL, and `cache` is None.
    """
    if not URL.match(path):
        return Folder(Path(path))
    if cache is None:
        raise ValueError(f"{path} is fetched from elsewhere: data.cache must name a local folder for it")
    return RemoteFolder(
        Path(cache), path.rstrip("/"), FileCache(Path(cache), math.ceil(cache_gb * 1e9)), open_url
    )


@dataclass(frozen=True)
class RemoteFolder(Folder):
    """A data set's files at a URL."""

    url: str
    """Of the folder; `{}` in it is replaced by the file's name, as in `pipe:ssh host cat /shards/{}`."""
    cache: FileCache
    open_url: OpenUrl

    def __str__(self) -> str:
        return self.url

    def name(self, file: str) -> str:
        if self.url.startswith("pipe:"):
            file = shlex.quote(file)
        elif self.url.lower().startswith(PERCENT_DECODED):
            file = quote(file)
        return self.url.replace("{}", file) if "{}" in self.url else f"{self.url}/{file}"

    def check_name(self, name: str) -> None:
        # A command such as ssh hands the name to another shell, where our quotes are gone.
        if not FETCHED_NAME.fullmatch(name) or (self.url.startswith("pipe:") and " " in name):
            raise ValueError(
                f"shard name {name!a} is not fetched from {self.url}: it may have letters, digits and "
                "._+=,- alone, and no part of it may begin with -"
            )

    def index(self) -> Path:
        """Fetch the index, as there may be another by now, to a file of its own content's name: what another
        run fetches later does not replace it."""
        url = self.name(INDEX_NAME)
        with _fetch_errors(url):
            content = b"".join(self._blocks(url))
            return self.cache.store(_file_name(url), content)

    def check_shards(self, shards: Iterable[Shard]) -> None:
        """They are checked when they are fetched."""

    def open(self, shard: Shard) -> IO[bytes]:
        url = self.name(shard.name)
        with _fetch_errors(url):
            return self.cache.open(_file_name(url), shard.num_bytes, lambda: self._blocks(url))

    def _blocks(self, url: str) -> Iterator[bytes]:
        with self.open_url(url) as stream:
            while block := stream.read(BLOCK):
                yield block


def check_cache_size(sets: Sequence[tuple[Folder, Sequence[Shard]]], window: int, cache_gb: float) -> None:
    """Check that the cache holds the shards that are read from at a time, `window` of each data set.

    Raises:
        ValueError: it does not: almost every sample would fetch a shard.
    """
    needed = 0
    for folder, shards in sets:
        if isinstance(folder, RemoteFolder):
            needed += sum(sorted((shard.num_bytes for shard in shards), reverse=True)[:window])
    if 0 < cache_gb * 1e9 < needed:
        raise ValueError(
            f"data.cache_gb is {cache_gb:g}, and the {window} shards of each data set that are read from "
            f"at a time have {needed / 1e9:.3g} GB: make it at least {needed * 1.01 / 1e9:.3g}, or 0 "
            "to keep all shards"
        )


def _file_name(url: str) -> str:
    """A file's name in the cache: hashed, because two data sets' shards have the same names."""
    tail = re.sub(r"[^A-Za-z0-9_.-]", "_", redact(url))[-40:]
    return f"{hashlib.sha256(url.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}-{tail}"


@contextmanager
def _fetch_errors(url: str) -> Iterator[None]:
    """Raises OSError, naming `url`, for what goes wrong inside; ValueError where a retry does not help."""
    try:
        yield
    except (MemoryError, AssertionError):
        raise
    except (OSError, ValueError, ImportError) as error:
        raise same_kind(error, f"{url} cannot be fetched: {error}") from error
    except Exception as error:
        # Every storage client has exceptions of its own.
        raise OSError(f"{url} cannot be fetched: {type(error).__name__}: {error}") from error


def _check_shard(path: Path, num_bytes: int) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"shard {path} is missing, though the index beside it lists it")
    actual = path.stat().st_size
    if actual != num_bytes:
        cause = "it is truncated" if actual < num_bytes else "it is not the file that was indexed"
        raise ValueError(f"shard {path} has {actual} bytes where its index says {num_bytes}: {cause}")
