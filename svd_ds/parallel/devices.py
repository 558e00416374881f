"""NVIDIA GPUs of this machine, and why torch cannot use them.

A torch without CUDA, or a driver that does not load, must not turn a run on GPUs into one on CPUs. On a
machine with GPUs a run uses CPUs only where CUDA_VISIBLE_DEVICES hides them.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

UNUSABLE = "torch cannot use the NVIDIA GPUs of this machine"
"""Beginning of every sentence about GPUs that torch cannot use."""
WITHOUT_CUDA = "is built without CUDA"
OLD_DRIVER = "driver on your system is too old"
"""Part of torch's own message."""
HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that show no GPU; the last one is Slurm's."""
DEV, DRIVER = Path("/dev"), Path("/proc/driver/nvidia/gpus")


def num_gpus() -> int:
    """Return the number of GPUs that torch can use."""
    with warnings.catch_warnings():
        # torch's warning about its driver: `check_gpus_are_usable` reports it.
        warnings.simplefilter("ignore", UserWarning)
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_gpus_are_usable(environ: Mapping[str, str] = os.environ) -> None:
    """Check that torch can use the NVIDIA GPUs of this machine, if it has any.

    Raises:
        ValueError: torch's build, or the driver's version, does not allow it.
        OSError: the driver fails for another reason, maybe on this machine alone.
    """
    if num_gpus() or environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN or not _has_gpus(environ):
        return
    sentence = f"{UNUSABLE}: {_reason()}; CUDA_VISIBLE_DEVICES= (empty) runs on its CPUs"
    raise ValueError(sentence) if is_mismatch(sentence) else OSError(sentence)


def is_mismatch(sentence: str) -> bool:
    """Return True if the installed torch does not fit the GPUs, and False if their driver fails."""
    return WITHOUT_CUDA in sentence or OLD_DRIVER in sentence


def _has_gpus(environ: Mapping[str, str]) -> bool:
    """Return True if this machine has NVIDIA GPUs that this process may use, or Slurm has allocated GPUs."""
    allocated = environ.get("SLURM_GPUS_ON_NODE", "0")
    if allocated != "0" or "CUDA_VISIBLE_DEVICES" in environ:
        return True
    files = [path for path in DEV.glob("nvidia*") if path.name.removeprefix("nvidia").isdecimal()]
    if files:
        return any(map(_may_open, files))
    # The driver makes the files when CUDA first starts.
    return DRIVER.is_dir() and any(DRIVER.iterdir())


def _may_open(path: Path) -> bool:
    """Return False if Slurm has not allocated the GPU: its control group forbids to open the device file."""
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError as error:
        return error.errno != errno.EPERM
    return True


def _reason() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} {WITHOUT_CUDA}"
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return " ".join(str(error).split()).rstrip(".")
    return "CUDA starts and finds none of them"
