"""Shared memory of a machine, through which the data workers pass their batches to the ranks.

A full /dev/shm kills a worker with SIGBUS in the middle of a run. Containers often have 64 MB of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from svd_ds.data.config import DataConfig, Shape

SHARED_MEMORY = Path("/dev/shm")


def check_shared_memory(
    config: DataConfig, micro: Sequence[int], num_ranks: int, folder: Path = SHARED_MEMORY
) -> None:
    """Check that the batches which wait in shared memory fit into it.

    Args:
        config: settings of the data.
        micro: clips of a micro-batch, for each bucket.
        num_ranks: ranks on this machine.
        folder: file system of the shared memory; without it nothing is checked.

    Raises:
        ValueError: they do not fit.
    """
    if config.num_workers == 0 or not folder.is_dir():
        return
    shapes = zip(config.shapes, micro, strict=True)
    batch = max(count * clip_bytes(shape, config.latents) for shape, count in shapes)
    # The batch that the rank computes with is one more.
    needed = num_ranks * (config.num_workers * config.prefetch + 1) * batch
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 1e9:.3g} GB free, and data.num_workers {config.num_workers} with "
            f"data.prefetch {config.prefetch} keep {needed / 1e9:.3g} GB of batches in it for the "
            f"{num_ranks} ranks of this machine: reduce one of them, or enlarge it (docker run --shm-size)"
        )


def clip_bytes(shape: Shape, latents: bool) -> int:
    """Return the size of a clip: uint8 frames, or float16 moments of latents and the frames at both ends."""
    pixels = shape.height * shape.width
    if not latents:
        return shape.num_frames * 3 * pixels
    # 8 channels at an eighth of the height and width, two bytes each.
    return shape.num_frames * 8 * 2 * pixels // 64 + 2 * 3 * pixels
