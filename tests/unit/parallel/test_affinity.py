"""Cores of a rank and of its GPU, with the sysfs folder of a made-up machine."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from svd_ds.parallel.affinity import bind_to_gpu_cores, describe, parse

GPU = torch.device("cuda", 3)


@pytest.fixture(autouse=True)
def _one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xB7, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> dict[int, set[int]]:
    """Thread -> its cores; 0 is the calling thread. Changed in place of the real ones."""
    masks: dict[int, set[int]] = {0: set(range(16))}

    def get(thread: int) -> set[int]:
        return masks.get(thread, masks[0])

    monkeypatch.setattr(os, "sched_getaffinity", get)
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, cores: masks.update({thread: cores}))
    return masks


def machine(folder: Path, cores: str) -> Path:
    """A machine on which `cores` are next to the GPU."""
    (folder / "0000:b7:00.0").mkdir()
    (folder / "0000:b7:00.0" / "local_cpulist").write_text(cores + "\n")
    return folder


def test_all_threads_of_a_rank_are_bound_to_the_cores_next_to_its_gpu(
    tmp_path: Path, masks: dict[int, set[int]]
) -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    line = bind_to_gpu_cores(GPU, machine(tmp_path, "8-11,24-27"))
    done.set()
    thread.join()
    assert line == "bound to the cores next to its GPU, 8-11 of 0-15"
    assert masks[os.getpid()] == masks[thread.native_id or 0] == {8, 9, 10, 11}


def test_rank_without_a_core_next_to_its_gpu_keeps_its_cores(
    tmp_path: Path, masks: dict[int, set[int]]
) -> None:
    line = bind_to_gpu_cores(GPU, machine(tmp_path, "48-63"))
    assert line is not None and "0-15, are not next to its GPU, 48-63 are: SLURM_CPU_BIND=none" in line
    assert masks == {0: set(range(16))}


@pytest.mark.parametrize("cores", ["0-31", "", "what?"])
def test_nothing_is_bound_or_logged_if_all_cores_are_near_or_nothing_is_known(
    tmp_path: Path, masks: dict[int, set[int]], cores: str
) -> None:
    assert bind_to_gpu_cores(GPU, machine(tmp_path, cores)) is None
    assert masks == {0: set(range(16))}


def test_machine_without_the_gpu_in_sysfs_is_left_alone(tmp_path: Path, masks: dict[int, set[int]]) -> None:
    assert bind_to_gpu_cores(GPU, tmp_path) is None


def test_real_threads_can_be_bound(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("one core: there is no choice")
    core = min(before)
    try:
        assert bind_to_gpu_cores(GPU, machine(tmp_path, str(core))) is not None
        assert os.sched_getaffinity(0) == {core}
    finally:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), before)


def test_lists_of_cores_are_those_of_the_kernel() -> None:
    for text, cores in (("0-2,7", {0, 1, 2, 7}), ("5", {5}), ("0,2,4-5", {0, 2, 4, 5})):
        assert parse(text) == cores and describe(cores) == text
