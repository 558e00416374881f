"""The trainer with and without what replaces DeepSpeed's loops over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svd_ds.weights.io import load_unet
from tests.distributed.conftest import RunRanks
from tests.runs import metrics

STEPS = 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_fast_host_loops_change_no_bit_of_a_run(
    run_ranks: RunRanks, shards: Path, tmp_path: Path, num_ranks: int
) -> None:
    """The network of the small default in bfloat16, on clips of the shards' size."""
    size = ("data.num_frames=4", "data.height=64", "data.width=80", "batch.size=6")
    quiet = ("evaluation.every=0", "sampling.every=1000000", "sampling.num_steps=1", "checkpoint.every=1000")
    settings = (f"data.path={shards}", f"run.steps={STEPS}", "optim.warmup_samples=6", *size, *quiet)
    for flag in ("true", "false"):
        run = (f"run.dir={tmp_path / flag}", f"parallel.fast_host_loops={flag}")
        ended = run_ranks(
            None, *settings, *run, num_ranks=num_ranks, WANDB_MODE="disabled", OMP_NUM_THREADS="1"
        )
        assert ended.returncode == 0, ended.stderr
        assert "DeepSpeed's own loops" not in ended.stdout
    rows = [
        [(row["loss"], row["grad_norm"]) for row in metrics(tmp_path / flag)] for flag in ("true", "false")
    ]
    assert len(rows[0]) == STEPS and rows[0] == rows[1]
    fast, own = (dict(load_unet(tmp_path / flag, "raw").named_parameters()) for flag in ("true", "false"))
    assert all(torch.equal(fast[name], own[name]) for name in own)
