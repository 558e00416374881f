"""The trainer, of which rank 1 fails alone in a step, while rank 0 waits for it in a collective.

failing_ranks.py FAILURE STEP WORKERS OVERRIDE ...

FAILURE is bug or memory. WORKERS is a file that gets the process ids of rank 1's data workers.
destroy_process_group never returns here, as NCCL's does not while other ranks sit in a collective.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from svd_ds import train
from svd_ds.batch import Batch
from svd_ds.training.objectives.diffusion import DiffusionObjective

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which "
    "12.38 GiB is free. Including non-PyTorch memory, this process has 66.77 GiB memory in use."
)
FAILURES = {"bug": KeyError("a bug"), "memory": torch.OutOfMemoryError(OUT_OF_MEMORY)}


def destroy_for_ever(*_: object) -> None:
    while True:
        time.sleep(1000)


def fail_in_step(step: int, failure: str, workers: Path) -> None:
    """Make the loss of a step raise the failure."""
    compute, num_steps = DiffusionObjective.loss, 0

    def loss(self: DiffusionObjective, net: Any, batch: Batch) -> Tensor:
        nonlocal num_steps
        num_steps += 1
        if num_steps == step:
            workers.write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
            raise FAILURES[failure]
        return compute(self, net, batch)

    DiffusionObjective.loss = loss  # type: ignore[method-assign]


def main() -> None:
    failure, step, workers = (sys.argv.pop(1) for _ in range(3))
    dist.destroy_process_group = destroy_for_ever
    if os.environ["RANK"] == "1":
        fail_in_step(int(step), failure, Path(workers))
    train.main()


if __name__ == "__main__":
    main()
