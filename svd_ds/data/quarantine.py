"""Samples that turn out unreadable: set aside with their cause, and counted, until they are too many."""

from __future__ import annotations

import csv
import io
import math
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import torch

from svd_ds.credentials import redact
from svd_ds.data.sidecar import clean_text
from svd_ds.fsync_io import append_row
from svd_ds.json_lines import read_json_lines

REFUSED = "refused.csv"
"""In the folder of an index: which samples were left out, and why."""
CPU_ALLOCATOR = "DefaultCPUAllocator"
"""In the message of the plain RuntimeError by which torch says that the host's memory ran out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine had no memory left: that is no fault of the sample or file that was read.

    libav's own error is not meant: it refuses what a damaged header claims.
    """
    if isinstance(error, av.FFmpegError):
        return False
    told = isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)
    return told or isinstance(error, MemoryError | torch.OutOfMemoryError)


def describe_error(error: Exception) -> str:
    """One line about an error, with its type where it is none that a damaged file is known to raise."""
    if isinstance(error, av.FFmpegError):
        return f"it cannot be decoded ({error.strerror})"
    text = " ".join(clean_text(str(error)).split())
    if isinstance(error, ValueError | OSError | tarfile.TarError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class Fault:
    """A sample that could not be read, and was replaced."""

    id: str
    shard: str
    """Its path or URL."""
    cause: str
    is_retryable: bool = False
    """Whether it may be read another time: its file system has failed, not the sample."""

    def __post_init__(self) -> None:
        # Of a URL: it is listed in a file, and compared with what is listed there.
        object.__setattr__(self, "shard", redact(self.shard))
        object.__setattr__(self, "cause", redact(self.cause))

    def error(self, sentence: str) -> ValueError | OSError:
        """For where it is one too many: of a kind that svd_ds.cli.is_retryable judges as this."""
        return OSError(sentence) if self.is_retryable else ValueError(sentence)


def refused_csv_lines(faults: Iterable[Fault]) -> list[str]:
    """The lines of a REFUSED that lists these samples: the header, and one line each."""
    rows = [("sample", "shard", "reason")]
    rows += [(clean_text(fault.id), clean_text(fault.shard), clean_text(fault.cause)) for fault in faults]
    lines: list[str] = []
    for row in rows:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(row)
        lines.append(text.getvalue())
    return lines


class Quarantine:
    """The unreadable samples that were met so far: by one rank, or by a whole run, whose logs/ list them."""

    def __init__(
        self, share: float, num_samples: int, path: Path | None = None, key: str = "data.max_quarantined"
    ) -> None:
        """`share`: of the `num_samples` samples, that may be unreadable, by the setting `key`; `path`: of the
        list, with a line for each that earlier lives of the run have met."""
        self.share, self.num_samples, self.path, self.key = share, num_samples, path, key
        rows = read_json_lines(path, _is_fault, skip_bad=True).rows if path is not None else []
        self._known = {(row["shard"], row["id"]) for row in rows}

    def __len__(self) -> int:
        return len(self._known)

    @property
    def allowed(self) -> int:
        """So many samples may be unreadable: one at least, unless the share is 0."""
        return math.ceil(self.share * self.num_samples)

    def add(self, faults: Iterable[Fault], step: int = 0, write: bool = False) -> int:
        """Count what was met, and `write` it to the list: how many there are now.

        Raises ValueError where that is more than allowed, and OSError where the last of them may pass.
        """
        new = {(fault.shard, fault.id): fault for fault in faults}
        for name in self._known & new.keys():
            del new[name]
        self._known |= new.keys()
        if write and new:
            assert self.path is not None, "a list has a path"
            for fault in new.values():
                append_row(self.path, {"step": step, **asdict(fault)})
        if new and len(self) > self.allowed:
            last = list(new.values())[-1]
            where = f"; {self.path} lists them" if self.path is not None else ""
            raise last.error(
                f"sample {last.id} of {last.shard} cannot be read: {last.cause}; that makes {len(self)} of "
                f"{self.num_samples} samples, where {self.key}={self.share:g} allows "
                f"{self.allowed}{where}"
            )
        return len(self)


def _is_fault(row: dict[str, Any]) -> bool:
    return isinstance(row.get("shard"), str) and isinstance(row.get("id"), str)
