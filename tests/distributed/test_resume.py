"""Runs that are stopped and resumed on other numbers of ranks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from svd_ds.weights.io import load_unet
from tests.runs import metrics

BATCH = 12
RunRanks = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def settings(shards: Path) -> tuple[str, ...]:
    # Restarts differ in run.steps, on which no rate may depend.
    plain = ("precision=fp32", "optim.schedule=constant")
    quiet = ("data.num_frames=3", "evaluation.every=0", "sampling.every=1000000", "sampling.num_steps=1")
    return ("debug=tiny", f"data.path={shards}", *plain, *quiet)


def clips_of_steps(record: Path) -> list[list[list[Any]]]:
    """Return [ordinal, id] of each clip on all ranks, by step."""
    clips = sorted(clip for line in record.read_text().splitlines() for clip in json.loads(line))
    return [clips[i : i + BATCH] for i in range(0, len(clips), BATCH)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_run_resumes_on_any_number_of_ranks_with_the_same_losses(
    settings: tuple[str, ...], run_ranks: RunRanks, tmp_path: Path
) -> None:
    """2 -> 1 -> 4 -> 3 ranks, against 2 that were never stopped."""
    script = Path(__file__).with_name("recorded_ranks.py")
    # The last blocks have one channel per group: the norm after them cancels their biases, whose gradients
    # are rounding errors (2e-11; the next smallest is 6e-7). With Adam's usual eps of 1e-8 they would get a
    # hundredth of a full step: four biases would differ by 9e-5, other parameters by less than 6e-6.
    large_eps = "optim.eps=1e-6"

    def train(name: str, ranks: int, steps: int) -> None:
        overrides = (*settings, large_eps, f"run.dir={tmp_path / name}", f"run.steps={steps}")
        record = tmp_path / f"{name}.jsonl"
        ended = run_ranks(script, record, *overrides, num_ranks=ranks, WANDB_MODE="disabled")
        assert ended.returncode == 0, ended.stderr

    train("uninterrupted", ranks=2, steps=8)
    for steps, ranks in ((2, 2), (4, 1), (6, 4), (8, 3)):
        train("elastic", ranks, steps)

    wanted, found = (
        clips_of_steps(tmp_path / "uninterrupted.jsonl"),
        clips_of_steps(tmp_path / "elastic.jsonl"),
    )
    assert len(wanted) == 8
    assert found == wanted
    rows, uninterrupted = metrics(tmp_path / "elastic"), metrics(tmp_path / "uninterrupted")
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row, other in zip(rows, uninterrupted, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=0, abs=1e-5), (rows, uninterrupted)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert row["lr"] == other["lr"]
    for which in ("raw", "power-0.050", "power-0.100"):
        ours, theirs = (load_unet(tmp_path / name, which) for name in ("elastic", "uninterrupted"))
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (a - b).abs().max() < 1e-5, (which, name)
