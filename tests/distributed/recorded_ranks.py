"""The trainer, which also records the clips that each rank trains on.

recorded_ranks.py RECORD OVERRIDE ...

RECORD gets a line for each micro-batch: [[ordinal, id], ...].
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from torch import Tensor

from svd_ds import train
from svd_ds.batch import Batch


def record_clips(path: str) -> None:
    """Append each micro-batch of this process to the record from now on."""
    from svd_ds.training.objectives.diffusion import DiffusionObjective

    record = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    loss = DiffusionObjective.loss

    def recorded(self: DiffusionObjective, net: Any, batch: Batch) -> Tensor:
        # One write, so that lines of ranks do not mix.
        line = json.dumps(list(zip(batch.ordinals, batch.ids, strict=True))) + "\n"
        os.write(record, line.encode())
        return loss(self, net, batch)

    DiffusionObjective.loss = recorded  # type: ignore[method-assign]


if __name__ == "__main__":
    record_clips(sys.argv.pop(1))
    train.main()
