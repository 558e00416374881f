"""A run that is killed 24 times and resumed on another number of ranks each time loses nothing."""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from svd_ds.training.progress import Progress
from svd_ds.training.shared_folder import TOKEN
from svd_ds.weights.manifest import check_checkpoint
from svd_ds.weights.restarts import complete_checkpoints, read_acquired_restarts
from tests.distributed.recorded_ranks import record_clips
from tests.forked import fork_server
from tests.runs import metrics

KILLS = 24
SEED = 1234
BATCH = 6
"""Clips of a step: 1, 2 and 3 ranks divide them."""
TIMEOUT_S = 400.0
"""Limit for what takes seconds on an idle machine; failures show by processes that end, not by this limit."""
SETTINGS = (
    "debug=tiny", "precision=fp32", "data.num_frames=2", "data.height=32", "data.width=32",
    "model.widths=[32]", "model.attention_levels=[true]", "ema.lengths=[0.1]", f"batch.size={BATCH}",
    "evaluation.every=0", "sampling.every=1000000", "sampling.num_steps=1", "checkpoint.every=1",
    # Restarts differ in run.steps, on which no rate may depend. The gradients of some biases are rounding
    # errors, which depend on the number of ranks: with Adam's usual eps of 1e-8 they would be updated.
    "optim.schedule=constant", "optim.eps=1e-6",
)  # fmt: skip
Ranks = list[ForkServerProcess]


def one_rank(folder: str, rank: int, world: int, port: int, overrides: tuple[str, ...]) -> None:
    """Run the trainer as one rank; its output and the clips that it trains on are written to `folder`."""
    output = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"WANDB_MODE": "disabled"}
    sys.argv = ["train", *overrides]
    record_clips(f"{folder}/clips.jsonl")
    from svd_ds.train import main

    main()


@pytest.fixture
def start(shards: Path) -> Iterator[Callable[[Path, int, int], Ranks]]:
    """Return start(folder, world, steps), which starts or resumes the run folder/run on `world` ranks."""
    started = []
    server = fork_server()

    def begin(folder: Path, world: int, steps: int) -> Ranks:
        folder.mkdir(exist_ok=True)
        overrides = (*SETTINGS, f"data.path={shards}", f"run.dir={folder}/run", f"run.steps={steps}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [
            server.Process(target=one_rank, args=(str(folder), rank, world, port, overrides))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        started.extend(ranks)
        return ranks

    yield begin
    for process in started:
        process.kill()


def has_begun_to_save(checkpoints: Path, num_restarts: int, step: int) -> bool:
    """True if the restart after `num_restarts` others has a draft of this step or a later one."""
    # Drafts of earlier restarts remain until this restart removes them: they do not count.
    own = [restart.token for restart in read_acquired_restarts(checkpoints)[num_restarts:]]
    drafts = [draft.name for token in own for draft in checkpoints.glob(f"step-*.{token}.tmp")]
    return any(name >= f"step-{step:07d}" for name in drafts)


def wait_until(condition: Callable[[], bool], ranks: Ranks, log: Callable[[], str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert all(process.is_alive() for process in ranks) and time.monotonic() < deadline, log()
        time.sleep(0.01)


def end(ranks: Ranks) -> list[int | None]:
    """Wait for the ranks; return their exit codes, None for one that is still alive."""
    for process in ranks:
        process.join(TIMEOUT_S)
    return [process.exitcode for process in ranks]


def ids_by_ordinal(record: Path) -> dict[int, set[str]]:
    found = defaultdict(set)
    for line in record.read_text().splitlines():
        for ordinal, name in json.loads(line):
            found[ordinal].add(name)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_run_killed_24_times_on_changing_numbers_of_ranks_loses_nothing(
    start: Callable[[Path, int, int], Ranks], tmp_path: Path
) -> None:
    """Every step is saved, so that most kills happen during a save, and a quarter during startup. One rank is
    killed, or rank 0, or all. While the ranks connect, none notices that another has ended, which their
    launcher would: then all are killed."""
    drawn, killed = random.Random(SEED), tmp_path / "killed"
    run, checkpoints = killed / "run", killed / "run/checkpoints"
    newest = 0
    for kill in range(KILLS):
        world, at_start = drawn.choice((1, 2, 3)), kill % 4 == 3
        who = "all" if at_start else drawn.choice(("all", "rank 0", "one"))
        one, steps, seconds = drawn.randrange(world), drawn.randint(1, 4), drawn.uniform(0, 1)
        num_restarts = len(read_acquired_restarts(checkpoints))
        ranks = start(killed, world, 100_000)
        case = f"kill {kill}: {who} of {world} ranks"

        def log(case: str = case) -> str:
            return f"{case}\n{(killed / 'log').read_text()}"

        if at_start:
            # From before the ranks meet to the first steps.
            time.sleep(5 * seconds)
        else:
            least = newest + steps
            wait_until(partial(has_begun_to_save, checkpoints, num_restarts, least), ranks, log)
            time.sleep(seconds)
        assert all(process.is_alive() for process in ranks), log()
        newest = max(complete_checkpoints(checkpoints), default=0)
        for process in {"all": ranks, "rank 0": ranks[:1], "one": ranks[one : one + 1]}[who]:
            process.kill()
        codes = end(ranks)
        assert all(codes), f"{codes}: a remaining rank must not wait for another. {log()}"

        complete = complete_checkpoints(checkpoints)
        assert max(complete, default=0) >= newest, f"{case}: a checkpoint was lost"
        newest = max(complete, default=0)
        for step, path in complete.items():
            check_checkpoint(path)
            assert Progress.read(path / "state.json").step == step, case
    assert newest > KILLS // 3, "the run made progress"
    assert len(read_acquired_restarts(checkpoints)) > KILLS // 2

    for token in run.glob(f"{TOKEN}.*"):
        os.utime(token, (0, 0))  # of a killed restart: removed when it is old
    last = newest + 2
    for folder in (killed, tmp_path / "uninterrupted"):
        assert end(start(folder, 2, last)) == [0, 0], (folder / "log").read_text()
    check_nothing_is_lost(killed, tmp_path / "uninterrupted", last)


def check_nothing_is_lost(killed: Path, uninterrupted: Path, last: int) -> None:
    rows, others = metrics(killed / "run"), metrics(uninterrupted / "run")
    assert [row["step"] for row in rows] == list(range(1, last + 1)), "each step once"
    for row, other in zip(rows, others, strict=True):
        assert row["samples"] == other["samples"] == BATCH * row["step"]
        assert row["loss"] == pytest.approx(other["loss"], rel=0, abs=1e-5), row["step"]
    clips, expected = ids_by_ordinal(killed / "clips.jsonl"), ids_by_ordinal(uninterrupted / "clips.jsonl")
    assert sorted(expected) == list(range(BATCH * last))
    # Restarts that were killed before they saved had taken steps beyond the last one, too.
    assert {ordinal: clips.get(ordinal) for ordinal in expected} == expected
    assert all(len(ids) == 1 for ids in clips.values()), "an ordinal is the same clip in every restart"

    run = killed / "run"
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {f"step-{step:07d}" for step in (last - 1, last)}
    left = [path for end in ("*.tmp", "*.new", "*.old", f"{TOKEN}.*") for path in run.rglob(end)]
    assert not left
