"""Kernels that fail on one rank are known to all ranks before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from svd_ds.model.ops.fused import triton_installed
from svd_ds.parallel.env import host
from tests.distributed.conftest import RunRanks
from tests.one_rank import SMALLEST

SCRIPT = Path(__file__).parent / "broken_kernel_ranks.py"


def settings(shards: Path, run: Path) -> tuple[str, ...]:
    return (*SMALLEST, f"data.path={shards}", f"run.dir={run}", "run.steps=1", "batch.size=2")


def test_kernel_that_fails_on_one_rank_is_refused_by_all_in_one_sentence(
    run_ranks: RunRanks, shards: Path, tmp_path: Path
) -> None:
    if not triton_installed():
        pytest.skip("Triton is not installed")
    named = (*settings(shards, tmp_path), "model.kernels=triton")
    ended = run_ranks(SCRIPT, "compiler", *named, timeout=120, TRITON_INTERPRET="1")
    sentence = (
        f"model.kernels is triton, which cannot be used on {host()}: "
        "RuntimeError: Failed to find C compiler: choose auto or torch"
    )
    assert ended.returncode == 2
    assert ended.stderr.count(sentence) == 1, ended.stderr
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_auto_takes_torchs_kernels_on_all_ranks_and_trains_with_one_note(
    run_ranks: RunRanks, shards: Path, tmp_path: Path
) -> None:
    ended = run_ranks(SCRIPT, "reports", *settings(shards, tmp_path), timeout=200)
    assert ended.returncode == 0, ended.stderr
    note = (
        "torch's kernels replace Triton's group norm and GEGLU and Triton's attention, "
        f"which cannot be used on {host()}: Failed to find C compiler."
    )
    # Without the console's line breaks.
    assert " ".join(ended.stdout.split()).count(note) == 1, ended.stdout
    model = yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]
    assert model["kernels"] == model["spatial_attention"] == model["temporal_attention"] == "auto"
