"""A run has one folder, the same for all its ranks, and one process at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.conftest import RunRanks
from tests.distributed.test_train import environment
from tests.runs import metrics

ROOT = Path(__file__).parents[2]
OWN_FOLDERS = Path(__file__).with_name("ranks_with_own_folders.py")
PATIENT = Path(__file__).with_name("patient_rank.py")


@pytest.fixture(scope="module")
def settings(shards: Path) -> tuple[str, ...]:
    small = ("debug=tiny", "model.widths=[32]", "model.attention_levels=[true]", "batch.size=2")
    quiet = ("data.num_frames=3", "evaluation.every=0", "sampling.every=1000000", "sampling.num_steps=1")
    return (*small, *quiet, f"data.path={shards}")


def test_ranks_with_a_folder_each_are_refused_before_they_train(
    settings: tuple[str, ...], run_ranks: RunRanks, tmp_path: Path
) -> None:
    ended = run_ranks(OWN_FOLDERS, *settings, f"run.dir={tmp_path}/disk-RANK/run", "run.steps=2")
    assert ended.returncode == 2, ended.stderr
    errors = {line for line in ended.stderr.splitlines() if line}
    assert len(errors) == 1, "all ranks say the same"
    (sentence,) = errors
    assert sentence.startswith("error: run.dir is ") and "share" in sentence
    for rank in range(2):
        assert f"{tmp_path}/disk-{rank}/run on rank {rank} (host " in sentence
        assert not (tmp_path / f"disk-{rank}/run/checkpoints").exists(), "nothing was trained"


@pytest.mark.slow
def test_folder_named_after_the_time_is_one_for_all_ranks(
    settings: tuple[str, ...], run_ranks: RunRanks, tmp_path: Path
) -> None:
    # To the microsecond: two ranks never read their clocks so close to each other.
    folder = f"run.dir={tmp_path}/runs/${{now:%Y-%m-%d/%H-%M-%S.%f}}"
    ended = run_ranks(OWN_FOLDERS, *settings, folder, "run.steps=1", WANDB_MODE="disabled")
    assert ended.returncode == 0, ended.stderr
    (run,) = tmp_path.glob("runs/*/*")
    assert len(list(run.glob("checkpoints/step-0000001/unet/rank-*-of-00002.safetensors"))) == 2
    assert {path.name for path in run.glob("logs/rank-*.log")} == {"rank-00000.log", "rank-00001.log"}


@pytest.mark.slow
def test_second_process_of_a_run_ends_the_first_and_loses_nothing(
    settings: tuple[str, ...], tmp_path: Path
) -> None:
    run, steps = tmp_path / "run", 12

    def start(*words: str) -> subprocess.Popen[str]:
        often = ("evaluation.every=4", "sampling.every=4", "checkpoint.every=4", f"run.steps={steps}")
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tools/launch.py"), "-n", "1", *words, *settings, f"run.dir={run}",
             *often],
            env=environment() | {"RUN": str(run)},
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    first, deadline = start("--script", str(PATIENT), "--"), time.monotonic() + 100
    while len(metrics(run)) < 6:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.02)
    second = start("--")
    _, errors = first.communicate(timeout=200)
    assert first.returncode == 2
    lines = errors.strip().splitlines()
    assert len(lines) == 1, errors
    assert f"another restart of this run has taken over {run}" in lines[0]
    out, errors = second.communicate(timeout=200)
    assert second.returncode == 0, errors
    assert "resuming at step 4" in out and f"done: {steps} steps" in out
    assert [row["step"] for row in metrics(run)] == list(range(1, steps + 1))
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert json.loads((run / "logs/outcome.json").read_text())["kind"] == "finished"
    (lost,) = (run / "logs").glob("outcome-*.json")
    assert json.loads(lost.read_text())["kind"] == "refused"
    assert not list(run.rglob("*.tmp")) and not list(run.rglob("*.new"))
