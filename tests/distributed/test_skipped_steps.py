"""Runs that end in a streak of skipped steps: messages, checkpoints, and the step that they resume from."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from svd_ds.batch import Batch
from svd_ds.jobs.signals import SIGNALS
from svd_ds.parallel.collectives import SharedError
from svd_ds.training.objectives.diffusion import DiffusionObjective
from svd_ds.training.preview import Previews
from svd_ds.weights.manifest import check_checkpoint
from svd_ds.weights.restarts import complete_checkpoints
from tests.one_rank import start
from tests.runs import metrics

SETTINGS = ("checkpoint.every=1", "checkpoint.keep_last=9", "guard.max_skips=9")
GOOD = 3
"""Number of steps before the streak."""


@pytest.fixture(autouse=True)
def _quiet_and_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Previews, "make", lambda *_: None)
    monkeypatch.setattr("svd_ds.run.write_report", lambda *_: None)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """spoil(steps, then): the loss of the steps after the first GOOD is NaN; `then` is called with the number
    of such steps."""

    def patch(then: Callable[[int], None] = lambda number: None) -> None:
        loss, calls = DiffusionObjective.loss, []

        def spoiled(self: DiffusionObjective, net: Any, batch: Batch) -> Tensor:
            calls.append(batch)
            if (number := len(calls) - GOOD) <= 0:
                return loss(self, net, batch)
            then(number)
            return loss(self, net, batch) * float("nan")

        monkeypatch.setattr(DiffusionObjective, "loss", spoiled)

    return patch


def check_saved(run: Path, outcome: str) -> None:
    found = complete_checkpoints(run / "checkpoints")
    assert list(found) == list(range(1, GOOD + 1)), "no skipped step is saved"
    for path in found.values():
        check_checkpoint(path)
    assert not list(run.rglob("*.tmp"))
    assert json.loads((run / "logs/outcome.json").read_text())["kind"] == outcome


def test_run_whose_last_steps_were_skipped_is_refused_as_unfinished(
    shards: Path,
    tmp_path: Path,
    spoil: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    spoil()
    with pytest.raises(SharedError, match=rf"run\.steps=5 with its last 2 steps skipped, .* step {GOOD};"):
        start(shards, run, "run.steps=5", *SETTINGS)
    assert "done" not in capfd.readouterr().out
    check_saved(run, "refused")
    skipped = [json.loads(line)["step"] for line in (run / "logs/skipped.jsonl").read_text().splitlines()]
    assert skipped == [4, 5]


def test_run_stopped_during_skipped_steps_saves_none_of_them_and_resumes_before_them(
    shards: Path,
    tmp_path: Path,
    spoil: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run, loss = tmp_path / "run", DiffusionObjective.loss
    spoil(lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 2 else None)
    ended = start(shards, run, "run.steps=9", *SETTINGS)
    assert ended.step == GOOD + 2
    printed = capfd.readouterr().out
    assert f"step {GOOD + 2}  not saved, because the last 2 steps were skipped" in printed
    check_saved(run, "preempted")

    monkeypatch.setattr(DiffusionObjective, "loss", loss)
    start(shards, run, "run.steps=5", *SETTINGS)
    assert f"resuming at step {GOOD}" in capfd.readouterr().out
    start(shards, tmp_path / "uninterrupted", "run.steps=5", *SETTINGS)
    expected = {row["step"]: row["loss"] for row in metrics(tmp_path / "uninterrupted")}
    assert {row["step"]: pytest.approx(row["loss"], rel=0, abs=1e-5) for row in metrics(run)} == expected
