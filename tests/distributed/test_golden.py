"""The losses of a fixed 20-step run, recorded, so that no commit changes the numbers unnoticed.

After an intended change of numbers, record them again, and give the reason in the commit message:

    RENEW_GOLDEN=1 python -m pytest tests/distributed/test_golden.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from svd_ds.data.writer import ShardWriter
from tests.runs import metrics
from tests.videos import encode, moving_square, sample_metadata

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "data" / "golden-losses.json"
STEPS = 20


def _environment() -> dict[str, str]:
    """Return what the last bits depend on: torch's version and the vector instructions of the processor."""
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


def _shards(folder: Path) -> Path:
    writer = ShardWriter(folder)
    for i in range(13):
        frames = moving_square(8, height=64, width=80, seed=i)
        writer.add(f"clip{i:02d}", "mp4", encode(frames), sample_metadata(frames, motion=0.01 * (i + 1)))
    writer.close()
    return folder


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Losses, gradient norms and evaluation losses of the run, by name."""
    folder = tmp_path_factory.mktemp("golden")
    shards, run = _shards(folder / "shards"), folder / "run"
    command = [sys.executable, "-m", "svd_ds.train", "debug=tiny", f"data.path={shards}", f"run.dir={run}"]
    command += [
        f"run.steps={STEPS}",
        "batch.size=4",
        "batch.micro=2",
        "precision=fp32",
        "optim.warmup_samples=8",
    ]
    command += ["evaluation.every=10", "evaluation.clips=2", "sampling.every=1000", "checkpoint.every=1000"]
    variables = {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env={**os.environ, **variables}, cwd=ROOT, check=True, timeout=280)
    rows = metrics(run)
    measured = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    found = {key: [row[key] for row in rows] for key in ("loss", "grad_norm", "lr")}
    return found | {f"evaluation_{key}": [row[key] for row in measured] for key in ("loss", "loss_average")}


@pytest.mark.slow
def test_losses_of_a_fixed_run_equal_the_recorded_ones(numbers: dict[str, list[Any]]) -> None:
    if os.environ.get("RENEW_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps({"environment": _environment(), "numbers": numbers}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    # On another processor sums run in another order, and the difference grows from step to step.
    tolerance = 1e-6 if golden["environment"] == _environment() else 2e-3
    assert len(numbers["loss"]) == STEPS and len(numbers["evaluation_loss"]) == 2
    assert numbers.keys() == golden["numbers"].keys()
    for name, values in golden["numbers"].items():
        assert torch.allclose(torch.tensor(numbers[name]), torch.tensor(values), rtol=tolerance, atol=0), (
            f"{name} differs from {GOLDEN.name}"
        )
