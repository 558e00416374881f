"""The trainer, which also writes down the clips that each rank learns from.

recorded_ranks.py RECORD OVERRIDE ...

RECORD gets a line for each micro-batch: [[ordinal, id], ...].
"""

from __future__ import annotations

import json
import sys
from typing import Any

from torch import Tensor

from svd_ds import train
from svd_ds.batch import Batch
from svd_ds.training.step import Diffusion


def main() -> None:
    record = open(sys.argv.pop(1), "a")  # noqa: SIM115 (until the end)
    loss = Diffusion.loss

    def recorded(self: Diffusion, net: Any, batch: Batch) -> Tensor:
        # In one write, which no other rank's comes into.
        record.write(json.dumps(list(zip(batch.ordinals, batch.ids, strict=True))) + "\n")
        record.flush()
        return loss(self, net, batch)

    Diffusion.loss = recorded  # type: ignore[method-assign]
    train.main()


if __name__ == "__main__":
    main()
