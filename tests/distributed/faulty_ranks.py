"""The trainer, of which rank 1 computes some steps wrongly the first time, and all ranks some clips always.

faulty_ranks.py FAULTS OVERRIDE ...

FAULTS, with commas between:
    loss:STEP       rank 1's loss is NaN in the first computation of this step
    gradient:STEP   its loss is right then, and its gradient NaN
    memory:STEP     rank 1 runs out of GPU memory in this step
    clip:ID         the loss of this clip is NaN in every computation
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor

from svd_ds import train
from svd_ds.batch import Batch
from svd_ds.training.objectives.diffusion import DiffusionObjective

BATCH = 4
"""Clips of a step."""


def plant(faults: list[str], rank: int) -> None:
    """Make this rank's `DiffusionObjective.loss` compute wrongly."""
    compute, seen = DiffusionObjective.loss, set[int]()

    def loss(self: DiffusionObjective, net: Any, batch: Batch) -> Tensor:
        step = batch.ordinals[0] // BATCH + 1
        if rank == 1 and f"memory:{step}" in faults:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        loss_B = compute(self, net, batch)
        first = batch.ordinals[0] not in seen
        seen.add(batch.ordinals[0])
        if rank == 1 and first and f"loss:{step}" in faults:
            return loss_B * torch.nan
        if rank == 1 and first and f"gradient:{step}" in faults:
            loss_B.register_hook(lambda gradient: gradient * torch.nan)
        bad = torch.tensor([f"clip:{id}" in faults for id in batch.ids])
        return torch.where(bad, torch.nan, loss_B)

    DiffusionObjective.loss = loss  # type: ignore[method-assign]


def main() -> None:
    plant(sys.argv.pop(1).split(","), int(os.environ["RANK"]))
    train.main()


if __name__ == "__main__":
    main()
