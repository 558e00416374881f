"""The checks of nodes together, on ranks of this machine that stand for nodes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from svd_ds.jobs import node_checks
from svd_ds.jobs.node_checks import TaskResult

RunRanks = Callable[..., subprocess.CompletedProcess[str]]
NUM_NODES = 3


def test_nodes_that_reach_each_other_measure_their_bandwidth(run_ranks: RunRanks, tmp_path: Path) -> None:
    ended = run_ranks(
        Path(node_checks.__file__),
        "together",
        tmp_path,
        tmp_path,
        num_ranks=NUM_NODES,
        timeout=100,
        LOCAL_WORLD_SIZE="1",
        SLURMD_NODENAME="node",
    )
    assert ended.returncode == 0, ended.stderr
    for rank in range(NUM_NODES):
        result = TaskResult.read(tmp_path / "node" / str(rank))
        assert result is not None and result.fault is None
        assert result.bandwidth is not None and 0 < result.bandwidth < 1000
