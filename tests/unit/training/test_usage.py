"""Goodput, MFU and peak memory."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from svd_ds.model.unet import UNetConfig
from svd_ds.run_folder import RunFolder
from svd_ds.training.retention import acquire
from svd_ds.training.usage import (
    OVERHEADS,
    Goodput,
    MfuCounter,
    StageTimer,
    device_peak_flops,
    peak_memory_gib,
    unet_forward_flops,
)


def test_stage_timer_counts_each_overhead_from_lap_to_lap() -> None:
    timer = StageTimer()
    for _ in range(2):
        with timer("data"):
            time.sleep(0.01)
    lap = timer.lap()
    assert 0.02 <= lap["data"] < 1 and lap["checkpoint"] == 0
    assert timer.lap() == dict.fromkeys(OVERHEADS, 0.0)


def line(step: int) -> str:
    overheads = {"data_s": 1.0, "checkpoint_s": 2.0, "evaluation_s": 0.0, "preview_s": 0.0}
    return json.dumps({"step": step, "step_s": 10.0, **overheads}) + "\n"


def test_goodput_covers_all_restarts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    before = time.time()
    acquire(folder.checkpoints, step=0)
    after = time.time()
    acquire(folder.checkpoints, step=2)
    folder.metrics.write_text(line(1) + line(2))
    goodput = Goodput.from_run_folder(folder)
    assert before <= goodput.started <= after
    goodput.add(10.0, {"data": 1.0, "checkpoint": 2.0, "evaluation": 3.0, "preview": 0.0})
    shares = goodput.shares(goodput.started + 100)
    assert shares.pop("preview") == 0
    assert shares == pytest.approx(
        {"compute": 0.27, "data": 0.03, "checkpoint": 0.06, "evaluation": 0.03, "restart": 0.61}
    )


def test_forward_flops_of_the_released_network() -> None:
    assert unet_forward_flops(UNetConfig(), 14, 256, 384, num_tokens=1) == pytest.approx(5.98e12, rel=0.01)


def test_mfu_is_a_fraction_of_the_peak_of_all_ranks() -> None:
    assert MfuCounter(flops_per_clip=6e12, peak_flops=2 * 3e14).mfu(clips_per_s=40) == pytest.approx(0.4)
    assert device_peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("Other", None)]
)
def test_peak_flops_by_gpu_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device_peak_flops(torch.device("cuda")) == peak


def test_peak_memory() -> None:
    assert 0.05 < peak_memory_gib() < 1000
