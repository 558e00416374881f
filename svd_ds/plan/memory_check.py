"""Planned and measured peak memory of a run, side by side in its log."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch

from svd_ds.config import RunConfig
from svd_ds.data.batching import BatchSplit
from svd_ds.parallel.env import Env
from svd_ds.plan.hardware import GIB
from svd_ds.plan.memory import plan_memory
from svd_ds.plan.requests import profile_gpu_steps

STEPS = 3
"""Steps of a process after which its peak is measured: the allocator and DeepSpeed's trace have settled."""
LOWEST_PRIORITY = 19
TOLERANCE = 0.10
"""Relative difference between plan and measurement above which a warning is printed."""


class MemoryCheck:
    """Prints the planned and the measured peak of rank 0, once both are known.

    The plan is made in a thread, which waits for a process of low priority, so that no step waits for it. If
    it fails, one note is printed and the run is not affected.
    """

    def __init__(
        self,
        plan: Callable[[], tuple[int, int]],
        measure: Callable[[], int],
        print_line: Callable[[str], None],
    ) -> None:
        """
        Args:
            plan: returns the planned peak of torch's allocator in bytes, without and with the workspaces and
                gathered weights that are an allowance; takes a minute.
            measure: returns the measured peak in bytes.
            print_line: prints a line for the user.
        """
        self._measure, self._print_line = measure, print_line
        self._num_steps, self._measured, self._is_done = 0, 0, False
        self._planned: tuple[int, int] | None = None
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, args=(plan,), name="memory plan", daemon=True)
        self._thread.start()

    def _run(self, plan: Callable[[], tuple[int, int]]) -> None:
        try:
            # Linux has a priority for each thread; a process inherits that of the thread which starts it.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
            self._planned = plan()
        except Exception as error:
            self._failure = " ".join(str(error).split()) or type(error).__name__

    def after_step(self) -> None:
        """Count a step; print the comparison when it is due."""
        if self._is_done:
            return
        self._num_steps += 1
        if self._num_steps == STEPS:
            self._measured = self._measure()
        if self._num_steps >= STEPS and not self._thread.is_alive():
            self._is_done = True
            self._print_line(self._comparison())

    def _comparison(self) -> str:
        if self._planned is None:
            return f"note: the memory of a step could not be planned: {self._failure}"
        least, most = self._planned
        line = f"memory: plan {least / GIB:.1f} GiB, measured {self._measured / GIB:.1f} GiB"
        if (1 - TOLERANCE) * least <= self._measured <= (1 + TOLERANCE) * most:
            return line
        return (
            f"warning: {line}: with the {(most - least) / GIB:.1f} GiB of workspaces and gathered weights "
            f"that the plan allows for, they differ by more than {TOLERANCE:.0%}"
        )


def start_memory_check(
    config: RunConfig, env: Env, split: BatchSplit, print_line: Callable[[str], None]
) -> MemoryCheck | None:
    """Start the check of a run on GPUs. Return None on CPUs, where no allocator counts, and with buckets,
    whose largest shape may come late.

    Args:
        split: division of the batch.
    """
    if env.device.type != "cuda" or config.data.buckets:
        return None

    def plan() -> tuple[int, int]:
        profile = profile_gpu_steps(config, [config.recompute], config.data.shape)[config.recompute]
        memory = plan_memory(config, profile, split.micro[0], env.world, env.local_world)
        return memory.allocated, memory.most_allocated

    return MemoryCheck(plan, torch.cuda.max_memory_allocated, print_line)
