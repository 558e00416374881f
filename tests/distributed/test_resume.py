"""Runs that are stopped at will, killed, and gone on with on other numbers of ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import socket
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
RANKS = 2
"""Of a run that is killed."""
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
    # The last blocks have a channel a group: the norm behind them takes their biases out again, and what is
    # left of those gradients is rounding (2e-11; the next smallest is 6e-7). Adam's usual 1e-8 would let it
    # through at a hundredth of the rate: four biases end 9e-5 apart then, and all else less than 6e-6.
    deaf = "optim.eps=1e-6"

    def train(name: str, ranks: int, steps: int) -> None:
        overrides = (*settings, deaf, f"run.dir={tmp_path / name}", f"run.steps={steps}")
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
            assert (a - b).abs().max() < 1e-5, (which, name)


def one_rank(log: str, rank: int, world: int, port: int, overrides: tuple[str, ...]) -> None:
    """The trainer, in a process of its own."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"WANDB_MODE": "disabled"}
    sys.argv = ["train", *overrides]
    from svd_ds.train import main

    main()


@pytest.fixture
def start(tmp_path: Path, settings: tuple[str, ...]) -> Iterator[Callable[..., list[Any]]]:
    """start(run, *overrides) begins a life of a run on two ranks, at once: their processes are forked from
    one that has imported everything."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["svd_ds.train", "svd_ds.run"])
    started = []

    def begin(run: Path, *overrides: str) -> list[Any]:
        small = ("model.widths=[32]", "model.attention_levels=[true]", f"batch.size={RANKS}")
        told = (*settings, *small, f"run.dir={run}", "checkpoint.every=1", *overrides)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = str(tmp_path / "log")
        ranks = [
            server.Process(target=one_rank, args=(log, rank, RANKS, port, told)) for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        started.extend(ranks)
        return ranks

    yield begin
    for process in started:
        process.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_again_and_again_loses_nothing(
    start: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """Every step is saved, so that most of the kills come upon a save; some upon the start. One rank is
    killed or the other, and the one that is left ends by itself; or both are. While they still meet, none
    sees that another has gone: that is their launcher's part, so that a start is of both."""
    run, seed = tmp_path / "run", random.randrange(10**6)
    moments, newest = random.Random(seed), 0
    for kill in range(10):
        life = start(run, "run.steps=100000")
        begins = kill % 4 == 3
        victims = life if begins else moments.choice([life[:1], life[1:], life])
        story = f"seed {seed}, kill {kill} of {len(victims)}"
        least, before = newest + moments.randint(1, 4), len(lives_of(run / "checkpoints"))
        deadline = time.monotonic() + 100

        def has_come_to_it(least: int = least, before: int = before, begins: bool = begins) -> bool:
            # A draft of its own: those of lives before lie about until it clears them.
            own = [life.token for life in lives_of(run / "checkpoints")[before:]]
            drafts = [draft for token in own for draft in (run / "checkpoints").glob(f"step-*.{token}.tmp")]
            return bool(own) if begins else any(draft.name >= f"step-{least:07d}" for draft in drafts)

        while not has_come_to_it():
            assert all_alive(life) and time.monotonic() < deadline, (story, (tmp_path / "log").read_text())
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1))
        assert all_alive(life), (story, (tmp_path / "log").read_text())
        for process in victims:
            process.kill()
        for process in life:
            process.join(60)
            assert process.exitcode, f"{story}: a rank that is left must not wait for the other"
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
        for process in start(name, last):
            process.join(120)
            assert process.exitcode == 0, (seed, (tmp_path / "log").read_text())
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, newest + 3)), f"seed {seed}"
    assert [row["loss"] for row in rows] == [row["loss"] for row in metrics(tmp_path / "whole")]
    assert (run / "checkpoints" / LIVES).read_text().count("\n") == 11


def all_alive(processes: list[Any]) -> bool:
    return all(process.is_alive() for process in processes)
