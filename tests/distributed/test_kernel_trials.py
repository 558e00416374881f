"""Kernels that fail on one rank are known to all ranks before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest

from svd_ds.model.ops.fused import triton_installed
from svd_ds.parallel.env import host
from tests.distributed.conftest import RunRanks
from tests.one_rank import SMALLEST

SCRIPT = Path(__file__).parent / "broken_kernel_ranks.py"


def test_kernel_that_fails_on_one_rank_is_refused_by_all_in_one_sentence(
    run_ranks: RunRanks, shards: Path, tmp_path: Path
) -> None:
    if not triton_installed():
        pytest.skip("Triton is not installed")
    settings = (*SMALLEST, f"data.path={shards}", f"run.dir={tmp_path}", "run.steps=2", "batch.size=2")
    ended = run_ranks(SCRIPT, *settings, "model.kernels=triton", timeout=120, TRITON_INTERPRET="1")
    sentence = (
        f"model.kernels is triton, which cannot be used on {host()}: "
        "RuntimeError: Failed to find C compiler: choose auto or torch"
    )
    assert ended.returncode == 2
    assert ended.stderr.count(sentence) == 1, ended.stderr
    assert not (tmp_path / "checkpoints").exists()
