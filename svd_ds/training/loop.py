"""The order in which a run does things. No tensor arithmetic here: each line names who does it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from svd_ds.batch import Batch
from svd_ds.data.cursor import Cursor
from svd_ds.parallel.collectives import (
    SharedError,
    all_gather_objects,
    all_reduce_mean,
    broadcast_from_rank0,
    raise_on_all_ranks,
)
from svd_ds.training.checkpoint import NonFiniteError
from svd_ds.training.compute import Computed, compute, compute_again
from svd_ds.training.evaluate import Evaluation
from svd_ds.training.fault_cause import FaultCause
from svd_ds.training.guard import GuardState
from svd_ds.training.metrics import StepMetrics
from svd_ds.training.optim import group_lrs, learning_rate
from svd_ds.training.parts import LoopConfig, TrainingComponents
from svd_ds.training.progress import Progress


@dataclass(frozen=True)
class _Step:
    """What became of a step, the same on all ranks."""

    progress: Progress
    """Behind it."""
    fault: str | None
    """Why the guard skipped it; None where it was taken."""
    stop: bool
    """Whether a rank was asked to stop, or nodes should be left."""


@dataclass(frozen=True)
class _Judged:
    """What the guard makes of a step, the same on all ranks. The engine holds the gradients of its last
    computation."""

    loss: float
    """Over all ranks."""
    grad_norm: float
    guard: GuardState
    trip: str | None
    """What was out of bounds in the first computation; None where nothing was."""
    skipped: str | None
    """Why the step is not taken; None where it is."""
    cause: FaultCause | None = None
    """None where the step was computed once."""


def train(parts: TrainingComponents, plan: LoopConfig, progress: Progress) -> Progress:
    """Train from `progress` to the plan's last step, or until the ranks are asked to stop; return where it
    ended."""
    stopped = due = False
    while progress.step < plan.total_steps and not stopped:
        step = _step(parts, plan, progress)
        progress, stopped = step.progress, step.stop
        if parts.guard.should_roll_back(progress.guard):
            why = f"{progress.guard.consecutive_skips} steps in a row were skipped, the last because {step.fault}"
            progress, due = _roll_back(parts, progress, why), False
            continue

        last = stopped or progress.step == plan.total_steps
        ended = last and not stopped
        if parts.evaluation is not None and (ended or progress.step % plan.evaluate_every == 0):
            _evaluate(parts, parts.evaluation, progress)
        due = due or last or progress.step % plan.checkpoint_every == 0
        try:
            # Behind the evaluation: what is told of a step must be told before a run can go on behind it.
            due = _save(parts, progress, due, taken=step.fault is None)
            if ended or progress.step % plan.preview_every == 0:
                _preview(parts, progress)
            if last:
                parts.checkpoints.finish()
        except NonFiniteError as error:
            parts.guard.check_may_roll_back(progress.guard, str(error))
            progress, due = _roll_back(parts, progress, str(error)), False
        parts.heartbeat()
    _check_end(parts, plan, progress)
    return progress


def _step(parts: TrainingComponents, plan: LoopConfig, progress: Progress) -> _Step:
    """Compute the next step, and take it unless the guard skips it."""
    started = time.perf_counter()
    samples = progress.samples + plan.batch_size
    lr = learning_rate(plan.optim, samples, plan.total_steps * plan.batch_size)

    read: list[tuple[Batch, Cursor]] = []
    computed = compute(parts, _read(parts, read))
    overheads_s = parts.clock.lap()
    loss, overheads_s["data"], asked = _reduce(parts, progress, computed.loss, overheads_s["data"])

    judged = _judge(parts, progress, [batch for batch, _ in read], computed, loss)
    progress = progress.advance(read[-1][1], plan.batch_size, judged.guard)
    if judged.skipped is None:
        parts.engine.step(group_lrs(plan.optim, lr))
    else:
        parts.engine.discard_gradients()
    terms = parts.objective.end_step()
    parts.ema.update(parts.engine.local_shards(), samples, plan.batch_size)

    clips = all_gather_objects(list(computed.clips)) if judged.trip is not None else []
    step_s = time.perf_counter() - started
    if parts.metrics is not None:
        parts.metrics.log(
            StepMetrics(
                step=progress.step,
                samples=progress.samples,
                loss=judged.loss,
                lr=lr,
                grad_norm=judged.grad_norm,
                clips_per_s=plan.batch_size / step_s,
                step_s=step_s,
                overheads_s=overheads_s,
                skipped=judged.guard.skipped,
                hardware_faults=judged.guard.hardware_faults,
                terms=terms,
            )
        )
        if judged.trip is not None:
            taken = judged.skipped is None
            parts.metrics.log_fault(progress.step, judged.trip, clips, judged.cause, taken)
    if judged.cause is not None and plan.exclude_bad_nodes:
        parts.stop.failing_nodes |= judged.cause.nodes
    return _Step(progress, judged.skipped, asked or bool(parts.stop.failing_nodes))


def _judge(
    parts: TrainingComponents, progress: Progress, batches: Sequence[Batch], computed: Computed, loss: float
) -> _Judged:
    """Have the guard judge a step, a second time where failing hardware computed it the first time."""
    trip, guard = parts.guard.judge(progress.guard, loss, computed.grad_norm)
    if trip is None or not parts.guard.config.recompute_tolerance:
        return _Judged(loss, computed.grad_norm, guard, trip, trip)
    again, cause = compute_again(parts, batches, computed)
    if not cause.hardware:
        return _Judged(loss, computed.grad_norm, guard, trip, trip, cause)
    (loss,) = all_reduce_mean([again.loss])
    skipped, guard = parts.guard.judge(progress.guard.with_hardware_fault(), loss, again.grad_norm)
    return _Judged(loss, again.grad_norm, guard, trip, skipped, cause)


def _read(parts: TrainingComponents, read: list[tuple[Batch, Cursor]]) -> Iterator[Batch]:
    """A step's micro-batches, each read when it is asked for, and then in `read` with the cursor behind the
    step."""
    while not read or len(read) < read[-1][0].num_micro_batches:
        with parts.clock("data"):
            read.append(next(parts.batches))
        yield read[-1][0]


def _reduce(
    parts: TrainingComponents, progress: Progress, loss: float, data_s: float
) -> tuple[float, float, bool]:
    """A step's one exchange of numbers among the ranks: its loss, its wait for data, whether to stop.

    Raises:
        SharedError: another start has taken the run folder over, or too many clips cannot be read.
    """
    faults = parts.pop_faults()
    # Rank 0 writes the files, so that it looks whether they are still this start's.
    lost = parts.metrics is not None and parts.checkpoints.is_fenced()
    loss, data_s, asked, unreadable, taken_over = all_reduce_mean(
        [loss, data_s, float(parts.stop.asked), float(len(faults)), float(lost)]
    )
    if taken_over:
        broadcast_from_rank0(parts.checkpoints.check_not_fenced)
    if unreadable:
        faults, step = all_gather_objects(faults), progress.step + 1
        raise_on_all_ranks(partial(parts.quarantine.add, faults, step, write=parts.metrics is not None))
    return loss, data_s, asked > 0


def _evaluate(parts: TrainingComponents, evaluation: Evaluation, progress: Progress) -> None:
    with parts.clock("evaluation"):
        measured = evaluation.measure(parts.engine, parts.ema)
    broadcast_from_rank0(parts.checkpoints.check_not_fenced)
    if parts.metrics is not None:
        parts.metrics.log_evaluation(progress.step, progress.samples, measured)
        parts.metrics.log_weights(progress.step, parts.engine.local_shards())


def _save(parts: TrainingComponents, progress: Progress, due: bool, taken: bool) -> bool:
    """Settle the save that is under way, and begin the one that is due; return whether it still is."""
    with parts.clock("checkpoint"):
        parts.checkpoints.poll_pending_save(taken)
        # In a streak of skipped steps the weights are in doubt: the save waits for a taken one.
        if due and taken:
            parts.checkpoints.save(progress, parts.engine, parts.ema, parts.objective, parts.settings)
    return due and not taken


def _preview(parts: TrainingComponents, progress: Progress) -> None:
    with parts.clock("preview"):
        preview = parts.previews.make(progress.step, parts.engine, parts.ema)
    if parts.metrics is not None and preview is not None:
        parts.metrics.log_preview(progress.step, preview)


def _check_end(parts: TrainingComponents, plan: LoopConfig, progress: Progress) -> None:
    """Refuse to call a run done whose last steps were skipped: all ranks see the same numbers.

    Raises:
        SharedError: it has come to its last step that way.
    """
    if (skipped := progress.guard.consecutive_skips) == 0:
        return
    if progress.step == plan.total_steps:
        raise SharedError(
            f"the run has come to run.steps={plan.total_steps} with its last {skipped} steps skipped, so "
            f"nothing is saved after step {progress.step - skipped}; logs/skipped.jsonl says why. Lower "
            "optim.lr, or widen guard.loss_factor and guard.norm_factor, or give it more run.steps"
        )
    if parts.metrics is not None:
        parts.metrics.print_line(
            f"step {progress.step}  not saved, for the last {skipped} steps were skipped: the same command "
            "resumes from the newest checkpoint before them"
        )


def _roll_back(parts: TrainingComponents, progress: Progress, why: str) -> Progress:
    """To the weights of the last good checkpoint. The clips go on: the bad ones are not seen again."""
    saved = parts.checkpoints.reload(parts.engine, parts.ema, parts.objective, why)
    if parts.metrics is not None:
        parts.metrics.print_line(f"step {progress.step}  {why}")
    if parts.metrics is not None:
        parts.metrics.log_rollback(saved.step, progress.step)
    return progress.rolled_back(saved)
