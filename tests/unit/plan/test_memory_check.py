"""Planned and measured memory of a run: one line, when both are known; a failed plan is a note."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from svd_ds.compose import compose
from svd_ds.data.batching import BatchSplit
from svd_ds.parallel.env import Env
from svd_ds.plan import memory_check
from svd_ds.plan.hardware import GIB
from svd_ds.plan.memory_check import STEPS, MemoryCheck, start_memory_check
from svd_ds.plan.planner import ProfileFn


def run_steps(check: MemoryCheck, count: int) -> None:
    for _ in range(count):
        check.after_step()


def planned(plan: object, measured: float) -> list[str]:
    """Lines of a run of a few steps whose plan is ready."""
    lines: list[str] = []
    check = MemoryCheck(plan, lambda: int(measured * GIB), lines.append)  # type: ignore[arg-type]
    check._thread.join(60)
    run_steps(check, STEPS - 1)
    assert not lines, "the first steps are not typical"
    run_steps(check, 5)
    return lines


def test_both_numbers_are_printed_once() -> None:
    assert planned(lambda: (int(15.7 * GIB), int(19 * GIB)), 16.1) == [
        "memory: plan 15.7 GiB, measured 16.1 GiB"
    ]


@pytest.mark.parametrize("measured", [14.2, 20.8])
def test_difference_within_a_tenth_is_none(measured: float) -> None:
    assert planned(lambda: (int(15.7 * GIB), int(19 * GIB)), measured)[0].startswith("memory: plan 15.7 GiB")


@pytest.mark.parametrize("measured", [13.9, 21.0])
def test_large_difference_is_a_warning(measured: float) -> None:
    (line,) = planned(lambda: (int(15.7 * GIB), int(19 * GIB)), measured)
    assert line.startswith(
        f"warning: memory: plan 15.7 GiB, measured {measured} GiB: with the 3.3 GiB of work"
    )


def test_failed_plan_does_not_disturb_the_run() -> None:
    def fail() -> tuple[int, int]:
        raise RuntimeError("no\ncompiler")

    assert planned(fail, 1.0) == ["note: the memory of a step could not be planned: no compiler"]


def test_steps_do_not_wait_for_the_plan() -> None:
    release, lines, peaks = threading.Event(), [], [7 * GIB, 9 * GIB]

    def plan() -> tuple[int, int]:
        release.wait(60)
        return 7 * GIB, 7 * GIB

    check = MemoryCheck(plan, lambda: peaks.pop(0), lines.append)
    run_steps(check, 2 * STEPS)
    assert not lines
    release.set()
    check._thread.join(60)
    run_steps(check, 3)
    assert lines == ["memory: plan 7.0 GiB, measured 7.0 GiB"], (
        "the peak of the first steps, not of a preview"
    )


def test_the_planning_process_has_the_lowest_priority() -> None:
    found = []

    def plan() -> tuple[int, int]:
        command = [sys.executable, "-c", "import os; print(os.getpriority(os.PRIO_PROCESS, 0))"]
        found.append(int(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
        return GIB, GIB

    before = os.getpriority(os.PRIO_PROCESS, 0)
    planned(plan, 1.0)
    assert found == [19] and os.getpriority(os.PRIO_PROCESS, 0) == before


def test_gpu_run_is_checked_against_its_own_plan(
    profile_fn: ProfileFn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_check, "profile_gpu_steps", profile_fn)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100 * GIB)
    env = Env(0, 16, 0, 8, "127.0.0.1", 0, torch.device("cuda", 0), "nccl")
    lines: list[str] = []
    check = start_memory_check(compose(["batch.size=64"]), env, BatchSplit(64, 16, (4,)), lines.append)
    assert check is not None
    check._thread.join(60)
    run_steps(check, STEPS)
    assert lines and "plan 24.1 GiB, measured 100.0 GiB" in lines[0]


def test_no_check_on_cpus_and_with_buckets() -> None:
    cpu = Env(0, 1, 0, 1, "127.0.0.1", 0, torch.device("cpu"), "gloo")
    assert start_memory_check(compose(), cpu, BatchSplit(8, 1, (8,)), print) is None
    words = ["data.num_frames=14", "data.height=64", "data.width=64", "+data.buckets={14x64x64: 2}"]
    gpu = Env(0, 1, 0, 1, "127.0.0.1", 0, torch.device("cuda", 0), "nccl")
    assert start_memory_check(compose(words), gpu, BatchSplit(8, 1, (2,)), print) is None
