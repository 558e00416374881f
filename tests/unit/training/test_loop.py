"""The order of the training loop, with components that record how they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svd_ds.data.cursor import Cursor
from svd_ds.data.quarantine import Fault, Quarantine
from svd_ds.parallel.collectives import SharedError
from svd_ds.training import gradients, loop
from svd_ds.training.checkpoint import NonFiniteError
from svd_ds.training.gradients import GradientComputation
from svd_ds.training.guard import Guard, GuardConfig
from svd_ds.training.loop import LoopConfig, TrainingComponents, train
from svd_ds.training.null_metrics import NullMetrics
from svd_ds.training.optim import OptimConfig
from svd_ds.training.prefetch import PrefetchedBatch
from svd_ds.training.progress import Progress

BATCH = 8
CONFIG = LoopConfig(
    total_steps=4,
    batch_size=BATCH,
    optim=OptimConfig(lr=1e-3, schedule="constant", warmup_samples=0),
    checkpoint_every=2,
    preview_every=3,
    evaluate_every=2,
)
START = Progress(Cursor(0, "data"))


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives of a single rank."""
    monkeypatch.setattr(loop, "all_reduce_mean", list)
    monkeypatch.setattr(loop, "all_gather_objects", list)
    monkeypatch.setattr(loop, "broadcast_from_rank0", lambda action: action())
    monkeypatch.setattr(loop, "raise_on_all_ranks", lambda action: action())
    monkeypatch.setattr(gradients, "all_gather_objects", list)


class Recorder:
    """Names of the calls, in order. `losses`: the loss of each computation of a step."""

    def __init__(self, losses: Callable[[int], float] = lambda step: 1.0, micro: int = 2) -> None:
        self.calls: list[str] = []
        self.losses, self.micro, self.num_computed = losses, micro, 0
        self.reloads_from = Progress(Cursor(2 * BATCH, "data"), step=2, samples=2 * BATCH)

    def note(self, name: str, result: Any = None) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> Any:
            self.calls.append(name)
            return result

        return call

    def batches(self, *faults: tuple[Fault, ...]) -> Iterator[PrefetchedBatch]:
        """Endless micro-batches; `faults` are those of the first ones."""
        step, remaining = 0, iter(faults)
        while True:
            step += 1
            for number in range(self.micro):
                self.calls.append("read")
                batch = SimpleNamespace(num_micro_batches=self.micro, ids=(f"clip-{step}-{number}",))
                batch.to = lambda device, batch=batch: batch
                cursor = Cursor(step * BATCH, "data")
                yield PrefetchedBatch(host=batch, on_device=batch, cursor=cursor, faults=next(remaining, ()))

    def loss(self, net: Any, batch: Any) -> torch.Tensor:
        self.calls.append("loss")
        step = int(batch.ids[0].split("-")[1])
        return torch.tensor([self.losses(step)], requires_grad=True)

    def components(self, **changes: Any) -> TrainingComponents:
        note = self.note
        engine: Any = SimpleNamespace(
            backward=note("backward"),
            gradient_norm=note("gradient_norm", torch.tensor(1.0)),
            step=note("optimizer"),
            discard_gradients=note("discard_gradients"),
            local_shards=dict,
        )
        objective: Any = SimpleNamespace(
            loss=self.loss,
            reduce_terms=note("reduce_terms", {}),
            end_step=note("end_step", {}),
            discard=note("discard_objective"),
        )
        checkpoints: Any = SimpleNamespace(
            poll_pending_save=note("poll"),
            save=note("save"),
            finish=note("finish"),
            reload=note("reload", self.reloads_from),
            is_fenced=lambda: False,
            check_not_fenced=note("check_not_fenced"),
        )

        @contextmanager
        def timed(kind: str) -> Iterator[None]:
            yield

        timer: Any = timed
        timer.lap = lambda: {"data": 0.0}
        local_norm: Any = SimpleNamespace(take=lambda: None, start=note("start_local_norm"))
        metrics: Any = NullMetrics()
        for name in ("log", "log_evaluation", "log_preview", "log_rollback", "log_fault"):
            setattr(metrics, name, note(name))
        made: Any = {
            "rank": 0,
            "engine": engine,
            "gradients": GradientComputation(engine, objective, local_norm, 0, torch.device("cpu")),
            "objective": objective,
            "ema": SimpleNamespace(update=note("ema")),
            "batches": self.batches(),
            "quarantine": Quarantine(1.0, 10),
            "guard": Guard(GuardConfig(max_skips=1, max_rollbacks=1)),
            "checkpoints": checkpoints,
            "settings": {},
            "evaluation": SimpleNamespace(measure=note("evaluate")),
            "previews": SimpleNamespace(make=note("preview", "a preview")),
            "stop": SimpleNamespace(asked=False, failing_nodes={}),
            "timer": timer,
            "heartbeat": note("heartbeat"),
            "metrics": metrics,
        }
        return TrainingComponents(**made | changes)


STEP = "read loss backward read loss backward gradient_norm reduce_terms optimizer end_step ema log"
EVALUATION = "evaluate check_not_fenced log_evaluation"


def words(*parts: str) -> list[str]:
    return " ".join(parts).split()


def test_step_reads_and_differentiates_each_micro_batch_then_updates_weights_averages_and_metrics() -> None:
    recorder = Recorder()
    end = train(recorder.components(), replace(CONFIG, total_steps=1), START)
    assert recorder.calls == words(STEP, EVALUATION, "poll save preview log_preview finish heartbeat"), (
        "evaluation is logged before the checkpoint is saved, and the last save is waited for"
    )
    assert (end.step, end.samples, end.cursor.next_ordinal) == (1, BATCH, BATCH)


def test_evaluations_checkpoints_and_previews_come_at_their_intervals_and_at_the_end() -> None:
    recorder = Recorder()
    end = train(recorder.components(), CONFIG, START)
    assert recorder.calls == words(
        f"{STEP} poll heartbeat",
        f"{STEP} {EVALUATION} poll save heartbeat",
        f"{STEP} poll preview log_preview heartbeat",
        f"{STEP} {EVALUATION} poll save preview log_preview finish heartbeat",
    )
    assert end.step == 4


def test_run_that_is_asked_to_stop_saves_and_ends_without_evaluation_or_preview() -> None:
    recorder = Recorder()
    stop = SimpleNamespace(asked=True, failing_nodes={})
    end = train(recorder.components(stop=stop), CONFIG, START)
    assert recorder.calls == words(f"{STEP} poll save finish heartbeat") and end.step == 1


SKIPPED = (
    "read loss backward read loss backward gradient_norm reduce_terms "
    "discard_gradients discard_objective loss backward loss backward gradient_norm reduce_terms "
    "discard_gradients end_step ema log log_fault"
)


def test_step_out_of_bounds_is_computed_again_then_skipped_and_its_save_waits_for_a_taken_step() -> None:
    recorder = Recorder(lambda step: float("nan") if step == 2 else 1.0)
    end = train(recorder.components(evaluation=None), replace(CONFIG, total_steps=3), START)
    assert recorder.calls == words(
        f"{STEP} poll heartbeat",
        f"{SKIPPED} poll heartbeat",
        f"{STEP} poll save preview log_preview finish heartbeat",
    ), "the save of step 2 is made after step 3"
    assert (end.guard.skipped, end.guard.consecutive_skips) == (1, 0)


def test_too_many_skips_in_a_row_roll_back_and_the_data_continues() -> None:
    recorder = Recorder(lambda step: float("nan") if step in (3, 4) else 1.0)
    end = train(recorder.components(evaluation=None), replace(CONFIG, preview_every=100), START)
    assert recorder.calls == words(
        f"{STEP} poll heartbeat",
        f"{STEP} poll save heartbeat",
        f"{SKIPPED} poll heartbeat",
        f"{SKIPPED} reload log_rollback",
        f"{STEP} poll heartbeat",
        f"{STEP} poll save preview log_preview finish heartbeat",
    )
    assert end.step == 4 and end.cursor.next_ordinal == 6 * BATCH, "six steps' clips for four steps"


def test_weights_that_are_not_finite_in_a_save_roll_back() -> None:
    recorder = Recorder()
    components = recorder.components(evaluation=None)
    polls = iter([None, None, NonFiniteError("a weight is not finite")])

    def poll(taken: bool) -> None:
        recorder.calls.append("poll")
        if (error := next(polls, None)) is not None:
            raise error

    components.checkpoints.poll_pending_save = poll  # type: ignore[method-assign]
    end = train(components, replace(CONFIG, preview_every=100), START)
    assert recorder.calls[2 * len(STEP.split()) + 5 :] == words(
        f"{STEP} poll reload log_rollback heartbeat",
        f"{STEP} poll heartbeat",
        f"{STEP} poll save preview log_preview finish heartbeat",
    )
    assert end.guard.rollbacks == 1


def test_run_whose_last_step_is_skipped_is_refused() -> None:
    recorder = Recorder(lambda step: float("nan") if step == 4 else 1.0)
    with pytest.raises(SharedError, match=r"reached run.steps=4 with its last 1 steps skipped"):
        train(recorder.components(evaluation=None), CONFIG, START)


def test_run_whose_folder_another_restart_has_acquired_ends_before_the_optimizer() -> None:
    recorder = Recorder()
    components = recorder.components()

    def fenced() -> None:
        raise SharedError("another restart has acquired the folder")

    components.checkpoints.is_fenced = lambda: True  # type: ignore[method-assign]
    components.checkpoints.check_not_fenced = fenced  # type: ignore[method-assign]
    with pytest.raises(SharedError, match="another restart"):
        train(components, CONFIG, START)
    assert "optimizer" not in recorder.calls and "log" not in recorder.calls


def test_damaged_samples_are_listed_with_the_step_that_replaced_them(tmp_path: Path) -> None:
    recorder = Recorder()
    quarantine = Quarantine(1.0, 10, tmp_path / "quarantine.jsonl")
    batches = recorder.batches((), (), (Fault("a", "0.tar", "it is junk"),))
    components = recorder.components(quarantine=quarantine, batches=batches)
    train(components, replace(CONFIG, total_steps=2), START)
    assert len(quarantine) == 1 and '"step": 2' in (tmp_path / "quarantine.jsonl").read_text()
