"""The engine on real ranks over gloo; zero3_ranks.py is the program of a rank."""

from __future__ import annotations

import json
import os
import re
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
    "weights_loaded_between_steps_are_used",
    "frozen_parameters_stay_and_the_others_train_as_in_plain_torch",
    "frozen_parameters_are_saved_unrounded_and_resumed",
    "steps_may_differ_in_their_number_of_micro_batches",
    "wrong_weights_are_refused",
    "save_that_fails_on_one_rank_fails_on_all",
    "gradient_norm_has_the_bits_of_deepspeeds_and_reads_nothing",
    "fast_host_loops_change_no_bit",
    "step_reads_at_most_one_number_on_the_host",
    "shards_are_written_between_earlier_and_later_gathers",
    "step_with_a_nonfinite_gradient_changes_nothing",
)
SLOW_CHECKS = (
    "recomputation_changes_no_bit",
    "weights_lent_to_the_engine_are_taken_back",
    "adapters_alone_train_as_in_plain_torch",
    "discarded_gradients_leave_no_trace",
    "evaluation_equals_plain_torch_and_leaves_no_trace",
    "fast_host_loops_change_no_bit_whatever_is_trained_and_kept",
    "fast_host_loops_change_no_bit_of_an_offloaded_optimizer",
    "offloaded_optimizer_discards_gradients_too",
    "offloaded_optimizer_equals_plain_torch_and_resumes_bitwise",
)
"""Checks that build many engines; two of them compile DeepSpeed's CPU Adam."""
Ended = subprocess.CompletedProcess[str]
RunRanks = Callable[..., Ended]


def test_every_check_is_run() -> None:
    files = sorted(SCRIPT.parent.glob("zero3_*.py"))
    defined = [name for file in files for name in re.findall(r"^def check_(\w+)", file.read_text(), re.M)]
    assert sorted(defined) == sorted(CHECKS + SLOW_CHECKS)


def outcomes(folder: Path) -> list[dict[str, Any]]:
    """Results of each rank: check -> traceback or None."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


@pytest.fixture(scope="module")
def two_ranks(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """Folder of the results of all checks on two ranks, and how the launcher ended."""
    folder = tmp_path_factory.mktemp("zero3")
    (folder / "extensions").mkdir()
    return folder, run_ranks(SCRIPT, folder, *CHECKS, TORCH_EXTENSIONS_DIR=str(folder / "extensions"))


@pytest.mark.parametrize("check", CHECKS)
def test_check_passes_on_two_ranks(two_ranks: tuple[Path, Ended], check: str) -> None:
    folder, ended = two_ranks
    assert ended.returncode == 0, ended.stderr
    found = outcomes(folder)
    assert len(found) == 2
    for rank, results in enumerate(found):
        assert results[check] is None, f"rank {rank}: {results[check]}"


def test_deepspeed_prints_nothing_and_compiles_nothing(two_ranks: tuple[Path, Ended]) -> None:
    folder, ended = two_ranks
    # The check with a nonfinite gradient may report it.
    assert all("Gradients are non-finite" in line for line in ended.stdout.splitlines())
    assert ended.stderr == ""
    assert not list((folder / "extensions").iterdir())


@pytest.mark.slow
def test_one_rank_without_a_launcher_equals_plain_torch(tmp_path: Path) -> None:
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
def test_long_checks_pass_on_two_ranks(run_ranks: RunRanks, tmp_path: Path) -> None:
    ended = run_ranks(SCRIPT, tmp_path, *SLOW_CHECKS, timeout=580)
    assert ended.returncode == 0, ended.stderr
    assert outcomes(tmp_path) == [dict.fromkeys(SLOW_CHECKS)] * 2
