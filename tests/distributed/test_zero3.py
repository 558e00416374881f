"""The engine on real ranks over gloo; zero3_ranks.py holds what the ranks do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("zero3_ranks.py")
CHECKS = (
    "no_rank_holds_the_model",
    "equals_plain_torch_and_resumes_bitwise",
    "bf16_has_exact_master_weights_and_resumes_bitwise",
    "weights_loaded_in_the_middle_are_used",
    "frozen_parts_stay_and_the_rest_learns_right",
    "frozen_parts_are_saved_as_they_came_and_resumed",
    "steps_may_differ_in_their_micro_batches",
    "wrong_weights_are_refused",
    "a_save_that_fails_on_one_rank_ends_it_on_all",
    "a_gradient_that_is_not_finite_changes_nothing",
)
SLOW_CHECKS = (
    "recomputation_changes_nothing",
    "borrowed_weights_are_given_back",
    "adapters_learn_alone_and_right",
    "forgotten_gradients_leave_no_trace",
    "evaluation_equals_plain_torch_and_leaves_no_trace",
    "offloaded_optimizer_forgets_too",
    "offloaded_optimizer_equals_plain_torch_and_resumes_bitwise",
)
"""They make engine after engine, and the last two compile DeepSpeed's CPU Adam."""
RunRanks = Callable[..., subprocess.CompletedProcess[str]]


def outcomes(folder: Path) -> list[dict[str, Any]]:
    """What each rank found: check -> traceback or None."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


@pytest.fixture(scope="module")
def two_ranks(
    run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """All checks on two ranks, started once."""
    folder = tmp_path_factory.mktemp("zero3")
    (folder / "extensions").mkdir()
    return folder, run_ranks(SCRIPT, folder, *CHECKS, TORCH_EXTENSIONS_DIR=str(folder / "extensions"))


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(two_ranks: tuple[Path, subprocess.CompletedProcess[str]], check: str) -> None:
    folder, ended = two_ranks
    assert ended.returncode == 0, ended.stderr
    found = outcomes(folder)
    assert len(found) == 2
    for rank, results in enumerate(found):
        assert results[check] is None, f"rank {rank}: {results[check]}"


def test_deepspeed_prints_nothing_and_compiles_nothing(
    two_ranks: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, ended = two_ranks
    # The one thing worth saying: the check with a gradient that is not finite.
    assert all("Gradients are non-finite" in line for line in ended.stdout.splitlines())
    assert ended.stderr == ""
    assert not list((folder / "extensions").iterdir())


@pytest.mark.slow
def test_one_rank_by_hand(tmp_path: Path) -> None:
    check = "equals_plain_torch_and_resumes_bitwise"
    ended = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, check],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])},
    )
    assert ended.returncode == 0, ended.stderr
    assert outcomes(tmp_path) == [{check: None}]


@pytest.mark.slow
def test_two_ranks_at_length(run_ranks: RunRanks, tmp_path: Path) -> None:
    ended = run_ranks(SCRIPT, tmp_path, *SLOW_CHECKS, timeout=580)
    assert ended.returncode == 0, ended.stderr
    assert outcomes(tmp_path) == [dict.fromkeys(SLOW_CHECKS)] * 2
