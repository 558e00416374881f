"""A training on a GPU: NCCL, bf16, ZeRO-3, checkpoint and resume."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import metrics


@pytest.mark.parametrize("settings", [(), ("ema.on_host=true",)], ids=["", "averages on the host"])
def test_run_trains_and_resumes(settings: tuple[str, ...], tmp_path: Path) -> None:
    for steps in (2, 4):
        command = [sys.executable, "-m", "svd_ds.train", "debug=tiny", f"run.dir={tmp_path}", *settings]
        subprocess.run([*command, f"run.steps={steps}", "checkpoint.every=2"], check=True)
    assert [row["step"] for row in metrics(tmp_path) if "loss" in row] == [1, 2, 3, 4]
    assert (tmp_path / "checkpoints" / "step-0000004" / "COMPLETE").exists()
