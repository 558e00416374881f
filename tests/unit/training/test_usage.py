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
    peak_memory_gib,
    peak_of,
    unet_forward_flops,
)


def test_a_clock_counts_each_kind_from_lap_to_lap() -> None:
    clock = StageTimer()
    for _ in range(2):
        with clock("data"):
            time.sleep(0.01)
    lap = clock.lap()
    assert 0.02 <= lap["data"] < 1 and lap["checkpoint"] == 0
    assert clock.lap() == dict.fromkeys(OVERHEADS, 0.0)


def line(step: int) -> str:
    waits = {"data_s": 1.0, "checkpoint_s": 2.0, "evaluation_s": 0.0, "preview_s": 0.0}
    return json.dumps({"step": step, "step_s": 10.0, **waits}) + "\n"


def test_goodput_is_of_all_lives(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    before = time.time()
    acquire(folder.checkpoints, step=0)
    after = time.time()
    acquire(folder.checkpoints, step=2)
    folder.metrics.write_text(line(1) + line(2))
    goodput = Goodput.of(folder)
    assert before <= goodput.started <= after
    goodput.add(10.0, {"data": 1.0, "checkpoint": 2.0, "evaluation": 3.0, "preview": 0.0})
    shares = goodput.shares(goodput.started + 100)
    assert shares.pop("preview") == 0
    assert shares == pytest.approx(
        {"compute": 0.27, "data": 0.03, "checkpoint": 0.06, "evaluation": 0.03, "restart": 0.61}
    )


def test_operations_are_those_of_the_released_network() -> None:
    assert unet_forward_flops(UNetConfig(), 14, 256, 384, num_tokens=1) == pytest.approx(5.98e12, rel=0.01)


def test_utilisation_is_the_share_of_all_ranks_peak() -> None:
    assert MfuCounter(clip_flops=6e12, peak_flops=2 * 3e14).mfu(clips_per_s=40) == pytest.approx(0.4)
    assert peak_of(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("Other", None)]
)
def test_a_gpu_is_known_by_its_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_of(torch.device("cuda")) == peak


def test_a_process_holds_memory() -> None:
    assert 0.05 < peak_memory_gib() < 1000
