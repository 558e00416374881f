"""Unreadable samples: each is listed with its cause and counted; too many end the run."""

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
"""Name of the file, in the folder of an index, with the samples that were left out and the reasons."""
CPU_ALLOCATOR = "DefaultCPUAllocator"
"""Part of the message of the RuntimeError that torch raises when host memory runs out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the machine ran out of memory, which is not a fault of the sample that was read.

    An out-of-memory error of libav does not count: it refuses the size that a damaged header claims.
    """
    if isinstance(error, av.FFmpegError):
        return False
    is_host_allocator = isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)
    return is_host_allocator or isinstance(error, MemoryError | torch.OutOfMemoryError)


def describe_error(error: Exception) -> str:
    """Describe an error in one line, with its type unless it is an expected error of a damaged file."""
    if isinstance(error, av.FFmpegError):
        return f"it cannot be decoded ({error.strerror})"
    text = " ".join(clean_text(str(error)).split())
    if isinstance(error, ValueError | OSError | tarfile.TarError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class Fault:
    """Sample that could not be read."""

    id: str
    shard: str
    """Path or URL of its shard, without credentials."""
    cause: str
    """Reason in one line, without credentials."""
    is_retryable: bool = False
    """True if a later read may succeed, because the file system failed and not the sample."""

    def __post_init__(self) -> None:
        # Faults are written to files, and compared with those that are listed there.
        object.__setattr__(self, "shard", redact(self.shard))
        object.__setattr__(self, "cause", redact(self.cause))

    def error(self, sentence: str) -> ValueError | OSError:
        """Make the error that ends the run; `svd_ds.cli.is_retryable` is the same for it as for this
        fault."""
        return OSError(sentence) if self.is_retryable else ValueError(sentence)


def refused_csv_lines(faults: Iterable[Fault]) -> list[str]:
    """Format faults as the lines of a CSV file (REFUSED): a header, and a line for each fault."""
    rows = [("sample", "shard", "reason")]
    rows += [(clean_text(fault.id), clean_text(fault.shard), clean_text(fault.cause)) for fault in faults]
    lines: list[str] = []
    for row in rows:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(row)
        lines.append(text.getvalue())
    return lines


class Quarantine:
    """Set of the unreadable samples found so far, by one rank or by all ranks of a run, with a limit."""

    def __init__(
        self, share: float, num_samples: int, path: Path | None = None, key: str = "data.max_quarantined"
    ) -> None:
        """Read the list of unreadable samples that a run has found before its restart.

        Args:
            share: share of the samples that may be unreadable.
            num_samples: number of samples.
            path: JSON lines file with the list; None keeps it in memory alone.
            key: config key of `share`, for the error message.
        """
        self.share, self.num_samples, self.path, self.key = share, num_samples, path, key
        rows = read_json_lines(path, _is_fault, skip_bad=True).rows if path is not None else []
        self._counted = {(row["shard"], row["id"]) for row in rows}

    def __len__(self) -> int:
        return len(self._counted)

    @property
    def allowed(self) -> int:
        """Number of samples that may be unreadable: at least one, unless the share is 0."""
        return math.ceil(self.share * self.num_samples)

    def add(self, faults: Iterable[Fault], step: int = 0, write: bool = False) -> int:
        """Count faults; a sample that was counted before is not counted again.

        Args:
            faults: faults to be counted.
            step: step of the run, for the list.
            write: append the new faults to the list.

        Returns:
            The number of unreadable samples so far.

        Raises:
            ValueError: there are more than allowed.
            OSError: there are more than allowed, and the last of them is retryable.
        """
        new = {(fault.shard, fault.id): fault for fault in faults}
        for name in self._counted & new.keys():
            del new[name]
        self._counted |= new.keys()
        if write and new:
            assert self.path is not None, "a list has a path"
            for fault in new.values():
                append_row(self.path, {"step": step, **asdict(fault)})
        if new and len(self) > self.allowed:
            last = list(new.values())[-1]
            where = f"; {self.path} lists them" if self.path is not None else ""
            raise last.error(
                f"sample {last.id} of {last.shard} cannot be read: {last.cause}; that makes {len(self)} of "
                f"{self.num_samples} samples, but {self.key}={self.share:g} allows "
                f"{self.allowed}{where}"
            )
        return len(self)


def _is_fault(row: dict[str, Any]) -> bool:
    """Return True if a row of the list names a sample."""
    return isinstance(row.get("shard"), str) and isinstance(row.get("id"), str)
