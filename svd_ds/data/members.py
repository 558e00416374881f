"""Reading of a sample's members from an open shard, and checks that the index matches the shard."""

from __future__ import annotations

import re
from typing import IO, Protocol

from svd_ds.data.sample import TAR_BLOCK, Sample


class ReadMember(Protocol):
    """Reader of a member of a sample, or of a part of it.

    Args:
        member: extension of the member.
        begin: first byte.
        num_bytes: number of bytes; None reads to the end of the member.

    Raises:
        ValueError: the sample has no such member, the member has too few bytes, or the index gives the offset
            of another sample's member.
        OSError: the shard cannot be read.
    """

    def __call__(self, member: str, begin: int = 0, num_bytes: int | None = None) -> bytes: ...


def member_reader(file: IO[bytes], sample: Sample, location: str) -> ReadMember:
    """Make a reader of the members of a sample.

    Args:
        file: the open shard.
        sample: entry of the index.
        location: path or URL of the shard, for error messages.
    """
    keys: dict[str, str] = {}

    def read(member: str, begin: int = 0, num_bytes: int | None = None) -> bytes:
        if member not in sample.members:
            raise ValueError(f"it has no .{member}")
        offset, size = sample.members[member]
        num_bytes = size - begin if num_bytes is None else num_bytes
        if member not in keys:
            keys[member] = _header_key(_read(file, offset - TAR_BLOCK, TAR_BLOCK))
            _check_key(sample, member, keys)
        content = _read(file, offset + begin, min(num_bytes, size - begin))
        if len(content) != num_bytes:
            raise ValueError(
                f"{location} holds {len(content)} of the {num_bytes} bytes of {sample.id}.{member}"
            )
        return content

    return read


def _read(file: IO[bytes], begin: int, num_bytes: int) -> bytes:
    """Read `num_bytes` bytes from `begin`, or fewer at the end of the file."""
    file.seek(begin)
    content = file.read(num_bytes)
    while len(content) < num_bytes and (chunk := file.read(num_bytes - len(content))):
        content += chunk
    return content


def _header_key(header: bytes) -> str:
    """Return the key of a tar member from its header block: its file name up to the first dot.

    The key is empty if the header block does not contain the name: if it is long or, in a pax tar, not ASCII.
    """
    name = header[:100].rstrip(b"\0")
    if len(header) < TAR_BLOCK or len(name) == 100 or b"\0" in name or not name.isascii() or b"?" in name:
        return ""
    return name.decode("ascii").rpartition("/")[2].split(".", 1)[0]


def _check_key(sample: Sample, member: str, keys: dict[str, str]) -> None:
    """Check that the members of a sample belong to it.

    The id of a sample is its key, or ends with it (external shards); characters that an id cannot have
    become `_`.

    Raises:
        ValueError: the index gives the offset of another sample's member.
    """
    key = keys[member]
    if key and (re.sub(r"[^\w-]+", "_", key) not in sample.id or len(set(keys.values()) - {""}) > 1):
        raise ValueError(f"at the offset of its .{member} the shard has sample {key}: the index is wrong")
