"""Reading of external tars: their files grouped by sample, in any order in the tar.

The members of a sample share a folder and the file name up to its first dot; files that macOS adds
(`._NAME`, `__MACOSX/`) and hidden files are not members. Concatenated tars are read as one.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from svd_ds.data.quarantine import describe_error
from svd_ds.data.sample import TAR_BLOCK
from svd_ds.data.sidecar import clean_text

MACOS_FOLDER = "__MACOSX"
COMPRESSED = {
    ".gz": b"\x1f\x8b",
    ".bz2": b"BZh",
    ".xz": b"\xfd7zXZ",
    ".zst": b"\x28\xb5\x2f\xfd",
}
"""Suffix -> first bytes of a compressed file, in which no member can be read on its own."""
COMPRESSED_REASON = "it is compressed, and samples are read by their offsets: unpack it to a plain .tar"

Members = dict[str, tarfile.TarInfo]
"""Extension in lower case -> entry of the tar."""


@dataclass
class TarContents:
    """Contents of a tar."""

    samples: dict[str, Members] = field(default_factory=dict)
    """Key -> members of the sample."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of each entry that is refused; folders and hidden files are not listed."""
    damage: str | None = None
    """Reason why the tar cannot be read to its end; None if it can."""


def is_compressed_name(name: str) -> bool:
    """Return True if a file name is that of a compressed tar."""
    lower = name.lower()
    return lower.endswith((".tgz", ".tbz2", ".txz", *(f".tar{suffix}" for suffix in COMPRESSED)))


def read_contents(path: Path) -> TarContents:
    """List the files of a tar.

    If several files have the same name, the last one counts, as when a tar is unpacked.

    Raises:
        ValueError: the file is compressed.
        tarfile.TarError: the file is not a tar.
        OSError: the file cannot be read.
    """
    contents = TarContents()
    with open(path, "rb") as file:
        head = file.read(8)
        if any(head.startswith(magic) for magic in COMPRESSED.values()):
            raise ValueError(COMPRESSED_REASON)
        begin: int | None = 0
        while begin is not None:
            file.seek(begin)
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for entry in tar:
                        _add_entry(contents, entry)
                    end = tar.offset
            except Exception as error:
                if begin == 0 and not contents.samples:
                    raise
                contents.damage = describe_error(error)
                break
            # The tarfile module takes a damaged or cut header for the end of the tar.
            if not _is_end(file, end):
                contents.damage = f"it is cut short or damaged at byte {end}"
                break
            begin = _next_block(file, end)
    return contents


def read_member(path: Path, entry: tarfile.TarInfo) -> bytes:
    """Read the bytes of an entry.

    Raises:
        ValueError: the entry is sparse, so that its bytes are not contiguous, or the tar is cut short.
    """
    if entry.issparse():
        raise ValueError(f"{entry.name} is stored with holes (sparse), so its bytes are not contiguous")
    with open(path, "rb") as file:
        file.seek(entry.offset_data)
        content = file.read(entry.size)
    if len(content) < entry.size:
        raise ValueError(f"the shard ends after {len(content)} of {entry.size} bytes of {entry.name}")
    return content


def _add_entry(contents: TarContents, entry: tarfile.TarInfo) -> None:
    """Add an entry to the contents, as a member of a sample or as a refused file."""
    path = PurePosixPath(entry.name)
    if entry.isdir() or path.name.startswith(".") or MACOS_FOLDER in path.parts:
        return
    name = clean_text(entry.name)
    if not entry.isfile():
        kind = "a link" if entry.islnk() or entry.issym() else "a special file"
        contents.refused.append((name, f"it is {kind} in the tar, without content"))
        return
    stem, _, extension = path.name.partition(".")
    key = str(path.parent / stem).lstrip("./")
    members = contents.samples.setdefault(key, {})
    if extension.lower() in members:
        contents.refused.append((name, "the tar has a later file of the same name, which is used"))
    members[extension.lower()] = entry


def _is_end(file: IO[bytes], offset: int) -> bool:
    """Return True if the block at `offset` is all zeros, which ends a tar."""
    file.seek(offset)
    return file.read(TAR_BLOCK) == bytes(TAR_BLOCK)


def _next_block(file: IO[bytes], offset: int) -> int | None:
    """Return the offset of the first block from `offset` on that is not all zeros; None if there is none."""
    for begin, block in _blocks(file, offset):
        if block.strip(b"\0"):
            return begin
    return None


def _blocks(file: IO[bytes], offset: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, content) of each block from `offset` on."""
    file.seek(offset)
    while block := file.read(TAR_BLOCK):
        yield offset, block
        offset += TAR_BLOCK
