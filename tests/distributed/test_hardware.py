"""A step whose result differs when it is computed again, on real ranks: failing hardware, not bad data."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from svd_ds.parallel.env import host
from tests.distributed.conftest import RunRanks
from tests.distributed.faulty_ranks import BATCH
from tests.one_rank import SMALLEST
from tests.runs import metrics

SCRIPT = Path(__file__).parent / "faulty_ranks.py"
STEPS = 5


def train(
    run_ranks: RunRanks, shards: Path, run: Path, faults: str, *overrides: str
) -> subprocess.CompletedProcess[str]:
    settings = (
        *SMALLEST,
        f"data.path={shards}",
        f"run.dir={run}",
        f"run.steps={STEPS}",
        "checkpoint.every=100",
    )
    # Two micro-batches a rank: all of a step is computed again.
    ended = run_ranks(SCRIPT, faults, *settings, f"batch.size={BATCH}", "batch.micro=1", *overrides)
    assert ended.returncode == 0, ended.stderr
    return ended


def out_of_bounds(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "logs/skipped.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def healthy(run_ranks: RunRanks, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "healthy"
    train(run_ranks, shards, run, "none")
    return run


def numbers(run: Path) -> dict[str, list[float]]:
    return {key: [row[key] for row in metrics(run)] for key in ("loss", "grad_norm", "skipped")}


def test_wrong_computations_name_the_rank_and_cost_no_step(
    run_ranks: RunRanks, shards: Path, healthy: Path, tmp_path: Path
) -> None:
    """A wrong loss names its rank at once; a wrong gradient once each rank keeps the norm of its own."""
    run = tmp_path / "run"
    ended = train(run_ranks, shards, run, "gradient:2,loss:3,gradient:4")
    assert numbers(run) == numbers(healthy), "bitwise"
    assert [row["hardware_faults"] for row in metrics(run)] == [0, 1, 2, 3, 3]
    unknown, loss, gradient = rows = out_of_bounds(run)
    assert [(row["step"], row["cause"], row["taken"]) for row in rows] == [
        (step, "hardware", True) for step in (2, 3, 4)
    ]
    assert loss["fault"] == "the loss is nan" and gradient["fault"] == "the gradient norm is inf"
    named = f"rank 1 on {host()} computed a"
    assert loss["message"].startswith(f"{named} loss of nan, then ")
    assert "rank" not in unknown["message"].replace("every rank", "") and host() in unknown["message"]
    assert gradient["message"].startswith(f"{named} gradient of norm nan, then ")
    warnings = [line for line in ended.stdout.splitlines() if "warning: failing hardware: " in line]
    assert len(warnings) == 3 and all(
        row["message"] in line for row, line in zip(rows, warnings, strict=True)
    )
    assert "steps with hardware faults" in (run / "report.html").read_text()


def test_bad_clip_is_skipped_and_named(run_ranks: RunRanks, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # The run must not end with a step of that clip.
    ended = train(run_ranks, shards, run, "clip:clip03", "run.steps=4")
    rows = out_of_bounds(run)
    assert rows, "the clip was seen"
    for row in rows:
        assert (row["cause"], row["taken"], len(row["clips"])) == ("data", False, BATCH)
        named = rf"the loss is not finite for clip03 \(rank [01] on {re.escape(host())}\)"
        assert re.fullmatch(f"computing it again gives the same numbers; {named}", row["message"])
        assert "clip03" in row["clips"]
        assert f"step {row['step']}  skipped: the loss is nan; {row['message']}" in ended.stdout
    last = metrics(run)[-1]
    assert (last["skipped"], last["hardware_faults"]) == (len(rows), 0)


@pytest.mark.slow
def test_no_step_is_recomputed_with_tolerance_0(run_ranks: RunRanks, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run_ranks, shards, run, "loss:2", "guard.recompute_tolerance=0")
    (row,) = out_of_bounds(run)
    assert (row["step"], row["cause"], row["taken"]) == (2, "unknown", False)
    assert metrics(run)[-1]["skipped"] == 1
