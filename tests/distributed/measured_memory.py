"""The trainer, of which each rank writes how many bytes torch's CPU allocator held during a step.

measured_memory.py FOLDER OVERRIDE ...    writes FOLDER/RANK
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from svd_ds import train
from svd_ds.training import loop

STEP = 4
"""Step that is measured: DeepSpeed gathers ahead from the third one on."""


def live_bytes() -> int:
    """Return the bytes of all tensors of this process."""
    storages = {}
    for found in gc.get_objects():
        # Not isinstance, which would import the modules that some libraries import lazily.
        if issubclass(type(found), torch.Tensor) and found.device.type == "cpu":
            storage = found.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def main() -> None:
    folder, train_step = Path(sys.argv.pop(1)), loop.train_step

    def measure(run: Any, config: Any, progress: Any) -> Any:
        if progress.step + 1 != STEP:
            return train_step(run, config, progress)
        before = live_bytes()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step = train_step(run, config, progress)
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        (folder / os.environ["RANK"]).write_text(str(before + peak))
        return step

    loop.train_step = measure
    train.main()


if __name__ == "__main__":
    main()
