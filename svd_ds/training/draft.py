"""A checkpoint while it is written: copies in host memory, the files of one rank, and their digests."""

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

DONE, UNDER_WAY, NOT_FINITE, FAILED = range(4)
"""Stages of one rank's work for a save."""
Files = Mapping[str, Mapping[str, Tensor]]
"""Name of a file inside the checkpoint -> the tensors in it."""


class NotFinite(ValueError):
    """A value that this rank would save is not finite."""


@dataclass
class PendingSave:
    """A save that is under way."""

    step: int
    draft: Path
    job: Future[Any]
    """This rank's last piece of work for it."""
    proven: bool = False
    """A step after it was taken, so that it may be published."""
    written: bool = False
    """By every rank: what is left is rank 0's."""


class HostCopies:
    """Copies in host memory, which is kept from one save to the next: to allocate it anew takes longer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def copy(self, files: Files) -> dict[str, dict[str, Tensor]]:
        """Copy the tensors of each file over what was copied before; return the copies."""
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
    draft: Path, tensors: Files, texts: Mapping[str, str], used: Mapping[str, int]
) -> dict[str, FileDigest]:
    """Write one rank's files durably; file name -> digest of what can be read back.

    Args:
        used: parameter name -> how many elements of this rank's slice belong to the parameter. The others
            are padding.

    Raises:
        NotFinite: a value is not finite; nothing is written.
        OSError: a file cannot be written.
    """
    for path, values in tensors.items():
        for name, value in values.items():
            own = value.detach().flatten()
            if not is_finite(own[: max(used.get(name, len(own)), 0)]):
                raise NotFinite(f"the checkpoint {draft} is given up: {name} in {path} is not finite")
    try:
        for path, values in tensors.items():
            write_tensors(draft / path, values)
        for path, text in texts.items():
            write_text(draft / path, text)
        return {path: compute_digest(draft / path) for path in (*tensors, *texts)}
    except OSError as error:
        raise OSError(f"the checkpoint {draft} cannot be written: {error}") from error


def save_stage(job: Future[Any]) -> int:
    """How far this rank's work is."""
    if not job.done():
        return UNDER_WAY
    error = job.exception()
    return DONE if error is None else NOT_FINITE if isinstance(error, NotFinite) else FAILED
