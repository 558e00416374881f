"""Draft of a checkpoint, while it is written: host copies, the files of one rank, and their checksums."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svd_ds.fsync_io import write_tensors, write_text
from svd_ds.tensor_files import is_finite
from svd_ds.weights.manifest import FileDigest, compute_digest

DONE, RUNNING, NOT_FINITE, FAILED = range(4)
"""Status of one rank's job for a save. The status of a save is the highest of its ranks."""
TensorFiles = Mapping[str, Mapping[str, Tensor]]
"""File name inside the checkpoint -> tensor name -> tensor."""


class NonFiniteValueError(ValueError):
    """A value in this rank's shards is not finite; the run raises checkpoint.NonFiniteError on all ranks."""


@dataclass
class PendingSave:
    """A save that is not committed yet."""

    step: int
    draft: Path
    job: Future[Any]
    """Last job of this rank's thread for the save."""
    proven: bool = False
    """True if a step was taken after the saved one, so that the save may be committed."""
    written: bool = False
    """True if every rank has written its files, so that only rank 0's commit is left."""


class HostCopies:
    """Copies of tensors in host memory, pinned for a GPU and reused by every save: allocation is slow."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def copy(self, files: TensorFiles) -> dict[str, dict[str, Tensor]]:
        """Copy the tensors of each file over the copies of the previous save, and return the copies."""
        copied = {path: self._copy(path, tensors) for path, tensors in files.items()}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return copied

    def _copy(self, path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = self._copies.setdefault(path, {})
        for name, value in tensors.items():
            if name not in copies:
                copies[name] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        torch._foreach_copy_([copies[name] for name in tensors], list(tensors.values()), non_blocking=True)
        return {name: copies[name] for name in tensors}


def write_draft(
    draft: Path, tensors: TensorFiles, texts: Mapping[str, str], num_valid: Mapping[str, int]
) -> dict[str, FileDigest]:
    """Write one rank's files and fsync them.

    Args:
        draft: folder to write into.
        tensors: tensors of each file.
        texts: file name -> content of a text file.
        num_valid: parameter name -> number of elements of this rank's shard before the padding; a tensor
            without an entry has no padding.

    Returns:
        File name -> size and checksum, read back from the disk.

    Raises:
        NonFiniteValueError: a value is not finite; nothing is written.
        OSError: a file cannot be written.
    """
    for path, values in tensors.items():
        for name, value in values.items():
            flat = value.detach().flatten()
            if not is_finite(flat[: max(num_valid.get(name, len(flat)), 0)]):
                raise NonFiniteValueError(
                    f"the checkpoint {draft} is not saved: {name} in {path} is not finite"
                )
    try:
        for path, values in tensors.items():
            write_tensors(draft / path, values)
        for path, text in texts.items():
            write_text(draft / path, text)
        return {path: compute_digest(draft / path) for path in (*tensors, *texts)}
    except OSError as error:
        raise OSError(f"the checkpoint {draft} cannot be written: {error}") from error


def save_status(job: Future[Any]) -> int:
    """Return the status of this rank's job: DONE, RUNNING, NOT_FINITE or FAILED."""
    if not job.done():
        return RUNNING
    error = job.exception()
    return DONE if error is None else NOT_FINITE if isinstance(error, NonFiniteValueError) else FAILED
