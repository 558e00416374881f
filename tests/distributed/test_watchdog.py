"""A rank that hangs: every rank writes where it stands and ends, and one line says so."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

RunRanks = Callable[..., subprocess.CompletedProcess[str]]

HANGS = """
import sys, time
from pathlib import Path

import torch
import torch.distributed as dist

from svd_ds.parallel.env import Env, init
from svd_ds.run_folder import RunFolder
from svd_ds.jobs.rank_session import Attempt
from svd_ds.jobs.watchdog import WatchdogConfig

def wait_for_a_file_system():
    time.sleep(1000)

env = Env.read()
init(env)
with Attempt(RunFolder(Path(sys.argv[1])), env, WatchdogConfig(minutes=0.02, first_minutes=0.1)) as attempt:
    for step in range(1000):
        if step == 2 and env.rank == 1:
            wait_for_a_file_system()
        dist.all_reduce(torch.ones(1))
        attempt.watchdog.beat()
"""


def test_ranks_that_hang_tell_where_and_end(run_ranks: RunRanks, tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    ended = run_ranks(script, tmp_path / "run", timeout=100)
    assert ended.returncode == 1, ended.stderr
    logs = [(tmp_path / f"run/logs/rank-0000{rank}.log").read_text() for rank in range(2)]
    assert "all_reduce" in logs[0]
    assert "wait_for_a_file_system" in logs[1]
    told = ended.stderr.splitlines()
    assert len(told) == 1 and "no step for 0.02 minutes" in told[0], told
    assert json.loads((tmp_path / "run/logs/outcome.json").read_text())["kind"] == "failed"
