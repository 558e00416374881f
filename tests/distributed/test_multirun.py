"""Several runs one after the other in the same processes, as with `-m`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

RunRanks = Callable[..., subprocess.CompletedProcess[str]]

RUNS = """
from datetime import timedelta

import torch
import torch.distributed as dist

from svd_ds.parallel.env import Env, init, shutdown
from svd_ds.parallel.groups import ParallelDims, create_groups

env = Env.read()
for _ in range(2):
    init(env, timeout=timedelta(seconds=30))
    create_groups(ParallelDims(env.world))
    total = torch.ones(1)
    dist.all_reduce(total)
    shutdown()
print(total.item())
"""


@pytest.mark.slow
def test_process_groups_can_be_created_again(run_ranks: RunRanks, tmp_path: Path) -> None:
    script = tmp_path / "runs.py"
    script.write_text(RUNS)
    ended = run_ranks(script, timeout=100)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "2.0\n"
