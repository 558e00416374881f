"""A rank that hangs: all ranks log their stack traces and end, and one line reports it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.distributed.conftest import RunRanks

SCRIPT = Path(__file__).with_name("hanging_ranks.py")


def test_ranks_that_hang_log_their_stacks_and_end(run_ranks: RunRanks, tmp_path: Path) -> None:
    ended = run_ranks(SCRIPT, tmp_path / "run", timeout=100)
    assert ended.returncode == 1, ended.stderr
    logs = [(tmp_path / f"run/logs/rank-0000{rank}.log").read_text() for rank in range(2)]
    assert "all_reduce" in logs[0]
    assert "wait_for_a_file_system" in logs[1]
    lines = ended.stderr.splitlines()
    assert len(lines) == 1 and "no step for 0.02 minutes" in lines[0], lines
    assert json.loads((tmp_path / "run/logs/outcome.json").read_text())["kind"] == "failed"
