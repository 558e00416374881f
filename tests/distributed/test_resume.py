"""Runs that are stopped at will, killed, and gone on with on other numbers of ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from svd_ds.model.lives import LIVES, complete_checkpoints, lives_of
from svd_ds.model.slices import SliceFiles
from svd_ds.model.weights import load_unet
from svd_ds.training.state import Progress
from tests.runs import metrics

BATCH = 12
RunRanks = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def settings(shards: Path) -> tuple[str, ...]:
    # Lives differ in run.steps, on which no rate may depend.
    plain = ("precision=fp32", "optim.schedule=constant")
    quiet = ("data.num_frames=3", "evaluation.every=0", "sampling.every=1000000", "sampling.num_steps=1")
    return ("debug=tiny", f"data.path={shards}", *plain, *quiet)


def clips_of_steps(record: Path) -> list[list[list[Any]]]:
    """The [ordinal, id] of each step's clips, whoever had them."""
    clips = sorted(clip for line in record.read_text().splitlines() for clip in json.loads(line))
    return [clips[i : i + BATCH] for i in range(0, len(clips), BATCH)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_with_any_number_of_ranks(
    settings: tuple[str, ...], run_ranks: RunRanks, tmp_path: Path
) -> None:
    """2 -> 1 -> 4 -> 3 ranks, against 2 that were never stopped."""
    script = Path(__file__).with_name("recorded_ranks.py")

    def train(name: str, ranks: int, steps: int) -> None:
        overrides = (*settings, f"run.dir={tmp_path / name}", f"run.steps={steps}")
        record = tmp_path / f"{name}.jsonl"
        ended = run_ranks(script, record, *overrides, num_ranks=ranks, WANDB_MODE="disabled")
        assert ended.returncode == 0, ended.stderr

    train("whole", ranks=2, steps=8)
    for steps, ranks in ((2, 2), (4, 1), (6, 4), (8, 3)):
        train("elastic", ranks, steps)

    wanted, found = clips_of_steps(tmp_path / "whole.jsonl"), clips_of_steps(tmp_path / "elastic.jsonl")
    assert len(wanted) == 8
    assert found == wanted
    rows, whole = metrics(tmp_path / "elastic"), metrics(tmp_path / "whole")
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row, other in zip(rows, whole, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=0, abs=1e-5), (rows, whole)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert row["lr"] == other["lr"]
    for which in ("raw", "power-0.050", "power-0.100"):
        ours, theirs = (load_unet(tmp_path / name, which) for name in ("elastic", "whole"))
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (a - b).abs().max() < 1e-4, (which, name)


def one_life(log: str, overrides: tuple[str, ...]) -> None:
    """The trainer on one rank, in a process of its own."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["WANDB_MODE"] = "disabled"
    sys.argv = ["train", *overrides]
    from svd_ds.train import main

    main()


@pytest.fixture
def start(tmp_path: Path, settings: tuple[str, ...]) -> Iterator[Callable[..., Any]]:
    """start(run, *overrides) begins a life of a run on one rank, at once: its process is forked from one that
    has imported everything."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["svd_ds.train", "svd_ds.run"])
    lives = []

    def begin(run: Path, *overrides: str) -> Any:
        small = ("model.widths=[32]", "model.attention_levels=[true]", "batch.size=1")
        told = (*settings, *small, f"run.dir={run}", "checkpoint.every=1", *overrides)
        life = server.Process(target=one_life, args=(str(tmp_path / "log"), told))
        life.start()
        lives.append(life)
        return life

    yield begin
    for life in lives:
        life.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_again_and_again_loses_nothing(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    """Every step is saved, so that most of the kills come upon a save; some upon the start."""
    run, seed = tmp_path / "run", random.randrange(10**6)
    moments, newest = random.Random(seed), 0
    for kill in range(10):
        story = f"seed {seed}, kill {kill}"
        life = start(run, "run.steps=100000")
        at = LIVES if kill % 4 == 3 else f"step-{newest + moments.randint(1, 4):07d}.*.tmp"
        before = lives_of(run / "checkpoints")
        deadline = time.monotonic() + 100
        while lives_of(run / "checkpoints") == before or not list((run / "checkpoints").glob(at)):
            assert life.is_alive() and time.monotonic() < deadline, (story, (tmp_path / "log").read_text())
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1))
        assert life.is_alive(), (story, (tmp_path / "log").read_text())
        life.kill()
        life.join()
        complete = complete_checkpoints(run / "checkpoints")
        assert max(complete, default=0) >= newest, f"{story}: a checkpoint was lost"
        newest = max(complete, default=0)
        for step, path in complete.items():
            assert Progress.read(path / "state.json").step == step, story
            for folder in path.iterdir():
                if folder.is_dir():
                    SliceFiles(folder)
    assert newest > 5, "it got on"

    last = f"run.steps={newest + 2}"
    for name in (run, tmp_path / "whole"):
        life = start(name, last)
        life.join(120)
        assert life.exitcode == 0, (seed, (tmp_path / "log").read_text())
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, newest + 3)), f"seed {seed}"
    assert [row["loss"] for row in rows] == [row["loss"] for row in metrics(tmp_path / "whole")]
    assert (run / "checkpoints" / LIVES).read_text().count("\n") == 11
