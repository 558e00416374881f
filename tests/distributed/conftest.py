"""Real ranks: programs started by tools/launch.py, as the trainer is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from svd_ds.data.writer import ShardWriter
from tests.videos import about, encode, moving_square

ROOT = Path(__file__).parents[2]
NUM_CLIPS = 13
"""In the shards: neither the ranks of a test nor its batch divide them."""
RunRanks = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run_ranks() -> RunRanks:
    """run_ranks(script, *arguments, num_ranks=2, **environment) runs a Python file on ranks to its end."""

    def run(
        script: Path, *arguments: object, num_ranks: int = 2, timeout: float = 240, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        launcher = [
            sys.executable,
            str(ROOT / "tools" / "launch.py"),
            "-n",
            str(num_ranks),
            "--script",
            str(script),
        ]
        return subprocess.run(
            [*launcher, "--", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of few short clips, in shards of unequal sizes."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    writer = ShardWriter(folder, samples_per_shard=5)
    for i in range(NUM_CLIPS):
        frames = moving_square(8, height=64, width=80, seed=i)
        writer.add(f"clip{i:02d}", "mp4", encode(frames), about(frames, motion=0.01 * (i + 1)))
    writer.close()
    return folder
