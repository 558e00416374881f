"""Open files and process groups of a rank of a run; open_files.py is the program of a rank."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from svd_ds.parallel.env import OPEN_FILES, OPEN_FILES_PER_RANK

SCRIPT = Path(__file__).with_name("open_files.py")
NUM_RANKS = (2, 4, 6)
pytestmark = pytest.mark.slow
RunRanks = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def counts(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, int]]]:
    """Counts of each rank, for each number of ranks. Rank 0 hosts the store, as it does under srun."""
    results = []
    for num_ranks in NUM_RANKS:
        folder = tmp_path_factory.mktemp("counts")
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        ended = run_ranks(
            SCRIPT,
            folder,
            num_ranks=num_ranks,
            timeout=100,
            TORCHELASTIC_USE_AGENT_STORE="False",
            MASTER_PORT=str(port),
        )
        assert ended.returncode == 0, ended.stderr
        results.append([json.loads((folder / f"rank-{r}.json").read_text()) for r in range(num_ranks)])
    return results


def test_deepspeed_adds_no_process_group_to_the_two_of_a_rank(counts: list[list[dict[str, int]]]) -> None:
    assert {rank["groups"] for ranks in counts for rank in ranks} == {2}


def test_rank_opens_one_connection_to_each_further_rank(counts: list[list[dict[str, int]]]) -> None:
    few, some, many = (ranks[-1]["files"] for ranks in counts)
    assert (some - few, many - some) == (2, 2)


def test_rank_0_opens_no_more_files_for_each_further_rank_than_the_limit_allows(
    counts: list[list[dict[str, int]]],
) -> None:
    few, some, many = (ranks[0]["files"] for ranks in counts)
    assert some - few == many - some == 2 * OPEN_FILES_PER_RANK
    assert few < OPEN_FILES / 2
