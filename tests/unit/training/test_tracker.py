from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from svd_ds.training.evaluate import Measured
from svd_ds.training.folder import RunFolder
from svd_ds.training.metrics import LoggerConfig, Metrics, StepMetrics
from svd_ds.training.tracker import Tracker
from svd_ds.training.usage import WAITS, Speed


class Recorder:
    """Stands for wandb's Run."""

    def __init__(self) -> None:
        self.axes: dict[str, str | None] = {}
        self.rows: list[dict[str, Any]] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.rows.append({"exit": exit_code})


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr("svd_ds.training.metrics.open_tracker", lambda *arguments: Tracker(found))
    return found


def test_every_row_is_told_at_our_step(recorder: Recorder, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open({}, step=0)
    numbers = StepMetrics(3, 24, 0.5, 1e-3, 1.0, 4.0, 2.0, dict.fromkeys(WAITS, 0.25), terms={"lpips": 0.1})
    tags = {"a": "spatial", "b": "temporal"}
    with Metrics(folder, LoggerConfig(), {}, 5, 0, Speed(1e12, 1e13), tags) as metrics:
        metrics.log(numbers)
        metrics.log_evaluation(3, 24, Measured("set", 4, [1.0], [0.5], [0.6], [2.0], [0.5, 0.7]))
        metrics.log_weights(3, {"a": torch.arange(100.0), "b": torch.ones(3), "x.lora.b": torch.ones(2)})
    assert recorder.axes == {"train/step": None, "*": "train/step"}
    step, evaluation, weights, end = recorder.rows
    assert {row["train/step"] for row in recorder.rows[:3]} == {3}
    assert step["train/data_s"] == 0.25 and step["train/lpips"] == 0.1
    assert step["train/mfu"] == pytest.approx(0.4)
    assert step["train/memory_gib"] > 0
    shares = [share for name, share in step.items() if name.startswith("train/goodput/")]
    assert len(shares) == 6
    assert evaluation["evaluation/loss/sigma-0"] == 0.5 and evaluation["evaluation/loss/frame-1"] == 0.7
    counts = {name: sum(it.histogram) for name, it in weights.items() if name != "train/step"}
    assert counts == {"weights/spatial": 100, "weights/temporal": 3, "weights/adapter": 2}
    assert end == {"exit": 0}


def test_a_run_that_fails_says_so(recorder: Recorder, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open({}, step=0)
    with pytest.raises(RuntimeError), Metrics(folder, LoggerConfig(), {}, 5, 0):
        raise RuntimeError("lost")
    assert recorder.rows == [{"exit": 1}]
