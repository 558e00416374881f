"""A rank that fails alone: the job ends at once, with a sentence, though no communicator can be destroyed."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed.conftest import RunRanks
from tests.one_rank import SMALLEST

SCRIPT = Path(__file__).parent / "failing_ranks.py"
LIMIT_S = 120.0
"""Seconds that the ranks may take in all; their imports may take half a minute on a busy machine."""
END_S = 20.0
"""Seconds between the failure and the end of all ranks."""


def is_running(pid: str) -> bool:
    path = Path("/proc", pid, "stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def fail(
    run_ranks: RunRanks, shards: Path, run: Path, failure: str, step: int, *overrides: str
) -> subprocess.CompletedProcess[str]:
    """Train until rank 1 fails in `step`; check that no data worker outlives its rank."""
    workers = run.with_suffix(".workers")
    settings = (*SMALLEST, f"data.path={shards}", f"run.dir={run}", "run.steps=5", "checkpoint.every=100")
    ended = run_ranks(
        SCRIPT, failure, step, workers, *settings, "batch.size=4", "data.num_workers=1", *overrides,
        timeout=LIMIT_S,
    )  # fmt: skip
    assert workers.exists(), ended.stderr
    assert time.time() - workers.stat().st_mtime < END_S
    pids = workers.read_text().split()
    assert pids
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "a data worker outlives its rank"
        time.sleep(0.05)
    return ended


def outcome(run: Path) -> tuple[str, int]:
    recorded = json.loads((run / "logs/outcome.json").read_text())
    return recorded["kind"], recorded["rank"]


def test_bug_of_one_rank_ends_the_job_at_once(run_ranks: RunRanks, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = fail(run_ranks, shards, run, "bug", 3)
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [
        f"error: rank 1: KeyError: 'a bug'; its log is {run}/logs/rank-00001.log"
    ]
    assert outcome(run) == ("failed", 1)
    log = (run / "logs/rank-00001.log").read_text()
    assert "Traceback" in log and "raise FAILURES" in log
    assert "step 1/5" in ended.stdout, "rank 0's output is not lost"


@pytest.mark.slow
def test_debug_shows_the_traceback_of_the_rank_that_failed(
    run_ranks: RunRanks, shards: Path, tmp_path: Path
) -> None:
    ended = fail(run_ranks, shards, tmp_path / "run", "bug", 1, "--debug")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr and "KeyError: 'a bug'" in ended.stderr


@pytest.mark.parametrize(
    ("step", "code", "kind"), [(1, 2, "refused"), pytest.param(2, 1, "failed", marks=pytest.mark.slow)]
)
def test_gpu_out_of_memory_is_refused_in_the_first_step_and_requeued_later(
    run_ranks: RunRanks, shards: Path, tmp_path: Path, step: int, code: int, kind: str
) -> None:
    run = tmp_path / "run"
    ended = fail(run_ranks, shards, run, "memory", step, "batch.micro=2")
    assert (ended.returncode, outcome(run)) == (code, (kind, 1))
    (line,) = ended.stderr.splitlines()
    if step == 1:
        assert line.startswith(
            "error: rank 1: out of GPU memory before the first step is complete: 20.00 GiB "
        )
        assert all(part in line for part in ("79.15 GiB", "batch.micro=1 (now 2)", "recompute=full"))
    else:
        assert line.startswith("error: rank 1: OutOfMemoryError: CUDA out of memory.")
