"""Real ranks of a program on this machine, and a data set for them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from svd_ds.data.writer import ShardWriter
from tests.forked import ForkedRanks
from tests.videos import encode, moving_square, sample_metadata

NUM_CLIPS = 13
"""Number of clips in the shards: no multiple of the ranks of a test, or of its batch size."""
RunRanks = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> RunRanks:
    """run_ranks(script, *arguments, num_ranks=2, **environment) runs a Python file on ranks to its end; the
    trainer where `script` is None."""

    def run(
        script: Path | None,
        *arguments: object,
        num_ranks: int = 2,
        timeout: float = 240,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp("ranks")
        return ForkedRanks(script, arguments, folder, num_ranks, **environment).wait(timeout)

    return run


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of few short clips, in shards of unequal sizes."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    writer = ShardWriter(folder, samples_per_shard=5)
    for i in range(NUM_CLIPS):
        frames = moving_square(8, height=64, width=80, seed=i)
        writer.add(f"clip{i:02d}", "mp4", encode(frames), sample_metadata(frames, motion=0.01 * (i + 1)))
    writer.close()
    return folder
