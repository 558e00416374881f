"""Tars that others wrote: their files by sample, wherever in the tar they are.

The members of a sample share a folder and the name up to its first dot; files of macOS (`._NAME`,
`__MACOSX/`) and hidden ones are no members. Tars that were joined one after another are read as one.
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
"""Suffix and first bytes of a compressed file, of which no part can be read by itself."""
COMPRESSED_REASON = (
    "it is compressed, and samples are read from their places in it: unpack it to a plain .tar"
)

Members = dict[str, tarfile.TarInfo]
"""Extension in lower case -> entry."""


@dataclass
class TarContents:
    """What a tar holds."""

    samples: dict[str, Members] = field(default_factory=dict)
    """By key."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of each entry that is no member of a sample, but for folders and hidden files."""
    damage: str | None = None
    """Why the tar cannot be read to its end."""


def is_compressed_name(name: str) -> bool:
    """Whether a file is a compressed tar by its name."""
    lower = name.lower()
    return lower.endswith((".tgz", ".tbz2", ".txz", *(f".tar{suffix}" for suffix in COMPRESSED)))


def read_contents(path: Path) -> TarContents:
    """List a tar's files.

    Of files of one name the last counts, as where a tar is unpacked.

    Raises:
        ValueError: it is compressed.
        tarfile.TarError: it is no tar.
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
                        _add(contents, entry)
                    end = tar.offset
            except Exception as error:
                if begin == 0 and not contents.samples:
                    raise
                contents.damage = describe_error(error)
                break
            # The module tarfile takes a header that is damaged or cut short for the end of the tar.
            if not _is_end(file, end):
                contents.damage = f"it is cut short or damaged at byte {end}"
                break
            begin = _next_block(file, end)
    return contents


def read_member(path: Path, entry: tarfile.TarInfo) -> bytes:
    """An entry's bytes. Raises ValueError where the tar does not hold them in one place."""
    if entry.issparse():
        raise ValueError(f"{entry.name} is stored with holes (sparse), so its bytes are not in one place")
    with open(path, "rb") as file:
        file.seek(entry.offset_data)
        content = file.read(entry.size)
    if len(content) < entry.size:
        raise ValueError(f"the shard ends after {len(content)} of {entry.size} bytes of {entry.name}")
    return content


def _add(contents: TarContents, entry: tarfile.TarInfo) -> None:
    path = PurePosixPath(entry.name)
    if entry.isdir() or path.name.startswith(".") or MACOS_FOLDER in path.parts:
        return
    name = clean_text(entry.name)
    if not entry.isfile():
        kind = "a link" if entry.islnk() or entry.issym() else "no regular file"
        contents.refused.append((name, f"it is {kind} in the tar, and has no bytes of its own there"))
        return
    stem, _, extension = path.name.partition(".")
    key = str(path.parent / stem).lstrip("./")
    members = contents.samples.setdefault(key, {})
    if extension.lower() in members:
        contents.refused.append((name, "the tar has a later file of this name, which counts"))
    members[extension.lower()] = entry


def _is_end(file: IO[bytes], offset: int) -> bool:
    file.seek(offset)
    return file.read(TAR_BLOCK) == bytes(TAR_BLOCK)


def _next_block(file: IO[bytes], offset: int) -> int | None:
    """Where, from `offset` on, the first block begins that is not of zeros; None where all are."""
    for at, block in _blocks(file, offset):
        if block.strip(b"\0"):
            return at
    return None


def _blocks(file: IO[bytes], offset: int) -> Iterator[tuple[int, bytes]]:
    file.seek(offset)
    while block := file.read(TAR_BLOCK):
        yield offset, block
        offset += TAR_BLOCK
