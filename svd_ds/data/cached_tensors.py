"""Tensors cached for a sample, in a safetensors file of which only the rows of a clip are read.

The file's metadata has one entry, `origin`: JSON with the input and the network that the tensors were
computed from. Format: https://huggingface.co/docs/safetensors (eight bytes with the length of the header,
the header as JSON, the tensors).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

LENGTH_BYTES = 8
DTYPES = {"F16": np.float16, "U8": np.uint8, "I64": np.int64}
"""Data types that `pack` writes."""

Origin = TypeVar("Origin")
ReadRange = Callable[[int, int], bytes]
"""Reads a range of a file: (first byte, number of bytes) -> bytes; raises ValueError or OSError."""


def pack(tensors: Mapping[str, Tensor], origin: Mapping[str, Any]) -> bytes:
    """Serialize tensors of any shape to a safetensors file; floats are rounded to float16.

    Args:
        tensors: name -> tensor, on any device.
        origin: input and network that the tensors were computed from, as JSON values.

    Returns:
        The bytes of the file.

    Raises:
        ValueError: a value is not finite in float16.
    """
    stored = {}
    for name, tensor in tensors.items():
        dtype = torch.float16 if tensor.is_floating_point() else tensor.dtype
        stored[name] = tensor.to("cpu", dtype).contiguous()
        if not stored[name].isfinite().all():
            raise ValueError(f"its {name} are not finite in float16")
    # A single entry: safetensors writes several in random order, and equal tensors must give equal bytes.
    return safetensors.torch.save(stored, {"origin": json.dumps(dict(origin))})


class TensorFile:
    """Reader of a file that `pack` wrote; it fetches only the bytes that are needed."""

    def __init__(self, read: ReadRange, member: str) -> None:
        """Read the header.

        Args:
            read: reads a range of the file.
            member: name of the file in error messages.

        Raises:
            ValueError: `pack` did not write the file, or it is cut short.
        """
        self.member, self._read = member, read
        try:
            length = int.from_bytes(read(0, LENGTH_BYTES), "little")
            self._header = json.loads(read(LENGTH_BYTES, length))
            self.origin: dict[str, Any] = dict(json.loads(self._header.pop("__metadata__")["origin"]))
            end = max(tensor["data_offsets"][1] for tensor in self._header.values())
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"its {member} has no valid origin in its metadata") from error
        self._begin = LENGTH_BYTES + length
        self._bytes(end - 1, 1)  # Detect a file that is cut short, even if its last rows are not read.

    def parse_origin(self, kind: Callable[..., Origin]) -> Origin:
        """Build a `kind` from the fields of the origin that `pack` stored.

        Raises:
            ValueError: the fields are not those of `kind`.
        """
        try:
            return kind(**self.origin)
        except TypeError as error:
            raise ValueError(f"its {self.member} has no valid origin in its metadata") from error

    def __contains__(self, name: str) -> bool:
        return name in self._header

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of each tensor.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            return {name: tuple(map(int, tensor["shape"])) for name, tensor in self._header.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its {self.member} is damaged ({error})") from error

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Read some rows of a tensor.

        Args:
            name: name of the tensor, of shape (N, ...).
            rows: ascending row numbers, from 0 to N - 1.

        Returns:
            A tensor of shape (len(rows), ...).

        Raises:
            ValueError: the tensor is missing, has too few rows, or is damaged.
        """
        try:
            num_rows, *shape = self._header[name]["shape"]
            dtype = np.dtype(DTYPES[self._header[name]["dtype"]])
            begin = self._header[name]["data_offsets"][0]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its {self.member} has no {name}") from error
        if rows[-1] >= num_rows:
            raise ValueError(f"its {self.member} has {num_rows} rows of {name}, but row {rows[-1]} is needed")
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        is_contiguous = len(rows) == rows[-1] - rows[0] + 1
        spans = [(rows[0], len(rows))] if is_contiguous else [(row, 1) for row in rows]
        content = bytearray().join(self._bytes(begin + row * size, count * size) for row, count in spans)
        stored = torch.from_numpy(np.frombuffer(content, dtype).reshape(len(rows), *shape))
        if stored.is_floating_point() and not bool(stored.isfinite().all()):
            raise ValueError(f"its {self.member} is damaged ({name} is not finite)")
        return stored

    def tensor(self, name: str) -> Tensor:
        """Read a complete tensor.

        Raises:
            ValueError: the tensor is missing or damaged.
        """
        if name not in self:
            raise ValueError(f"its {self.member} has no {name}")
        return self.rows(name, range(self._header[name]["shape"][0]))

    def _bytes(self, begin: int, num_bytes: int) -> bytes:
        """Read bytes of the tensors; `begin` counts from the end of the header."""
        try:
            return self._read(self._begin + begin, num_bytes)
        except ValueError as error:
            raise ValueError(f"its {self.member} is damaged ({error})") from error
