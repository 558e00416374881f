"""slurm/encode.sh on a real Slurm: the ranks on two nodes divide the shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from svd_ds.data.shards import Index
from tests.cluster.conftest import ROOT, Cluster


@pytest.mark.slow
def test_ranks_on_two_nodes_encode_every_clip(cluster: Cluster, tmp_path: Path) -> None:
    shards, out = ROOT / "data/quickstart", tmp_path / "latents"
    job = cluster.submit("slurm/encode.sh", str(shards), str(out), "--size", "64x64")
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), cluster.output(job)
    assert len(Index.load(out)) == len(Index.load(shards))
