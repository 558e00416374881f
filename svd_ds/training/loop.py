"""Training loop: the sequence of steps, evaluations, checkpoints and previews. No tensor arithmetic."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from svd_ds.data.quarantine import Quarantine
from svd_ds.jobs.signals import StopRequest
from svd_ds.parallel.collectives import (
    SharedError,
    all_gather_objects,
    all_reduce_mean,
    broadcast_from_rank0,
    raise_on_all_ranks,
)
from svd_ds.parallel.engine import Engine
from svd_ds.training.checkpoint import Checkpoints, NonFiniteError
from svd_ds.training.checkpoint_files import NetworkSettings
from svd_ds.training.ema import ShardEMA
from svd_ds.training.evaluate import Evaluation
from svd_ds.training.fault_cause import FaultCause
from svd_ds.training.gradients import GradientComputation, StepBatches, StepGradients, StepNumbers
from svd_ds.training.guard import Guard, GuardState
from svd_ds.training.null_metrics import NullMetrics, StepMetrics
from svd_ds.training.objectives.base import Objective
from svd_ds.training.optim import OptimConfig, group_lrs, learning_rate
from svd_ds.training.prefetch import Prefetcher
from svd_ds.training.preview import Previews
from svd_ds.training.progress import Progress
from svd_ds.training.usage import StageTimer


@dataclass(frozen=True)
class LoopConfig:
    """Length of a run, and the intervals of evaluations, checkpoints and previews."""

    total_steps: int
    batch_size: int
    """Clips in an optimiser step, over all ranks."""
    optim: OptimConfig
    checkpoint_every: int
    preview_every: int
    evaluate_every: int
    exclude_bad_nodes: bool = False
    """True if the launcher can restart the ranks on other nodes: the run then stops at a failing node."""

    @property
    def total_samples(self) -> int:
        """Clips of the whole run."""
        return self.total_steps * self.batch_size


@dataclass(frozen=True)
class TrainingComponents:
    """Everything that the loop calls, on one rank."""

    rank: int
    engine: Engine
    gradients: GradientComputation
    objective: Objective
    ema: ShardEMA
    batches: Prefetcher
    """Iterator over the micro-batches of this rank."""
    quarantine: Quarantine
    """Damaged samples of all ranks."""
    guard: Guard
    checkpoints: Checkpoints
    settings: NetworkSettings
    """Settings of the network, for its checkpoints."""
    evaluation: Evaluation | None
    """None without evaluation."""
    previews: Previews
    stop: StopRequest
    timer: StageTimer
    heartbeat: Callable[[], None]
    """Reports to the watchdog that a step is done."""
    metrics: NullMetrics
    """Metrics on rank 0, NullMetrics on the others."""


@dataclass(frozen=True)
class _StepResult:
    """Outcome of one step, the same on all ranks."""

    progress: Progress
    """Progress after the step."""
    skipped: str | None
    """Reason why the guard skipped the step; None if it was taken."""
    stop: bool
    """True if a rank was asked to stop, or failing nodes should be excluded."""


@dataclass(frozen=True)
class _GuardDecision:
    """The guard's decision about a step, the same on all ranks."""

    numbers: StepNumbers
    """Numbers of the computation that counts; the loss is the mean over all ranks."""
    guard: GuardState
    fault: str | None
    """Sentence about the value that was out of bounds in the first computation; None if there was none."""
    skipped: str | None
    """Reason why the step is not taken; None if it is."""
    cause: FaultCause | None = None
    """Result of the second computation; None if the step was computed once."""


def train(run: TrainingComponents, config: LoopConfig, progress: Progress) -> Progress:
    """Train from `progress` to the last step, or until a rank is asked to stop. All ranks call it.

    Returns:
        The progress at the end.

    Raises:
        SharedError: the last steps of the run were skipped, the guard has rolled back too often, or a
            checkpoint cannot be written.
    """
    stopped = save_due = False
    while progress.step < config.total_steps and not stopped:
        step = train_step(run, config, progress)
        progress, stopped = step.progress, step.stop
        if run.guard.should_roll_back(progress.guard):
            skips = progress.guard.consecutive_skips
            reason = f"{skips} steps in a row were skipped, the last because {step.skipped}"
            progress, save_due = _roll_back(run, progress, reason), False
            continue

        last = stopped or progress.step == config.total_steps
        completed = last and not stopped
        if run.evaluation is not None and (completed or progress.step % config.evaluate_every == 0):
            _evaluate(run, run.evaluation, progress)
        save_due = save_due or last or progress.step % config.checkpoint_every == 0
        try:
            # After the evaluation: the metrics of a step are written before its checkpoint is committed.
            save_due = _save(run, progress, save_due, taken=step.skipped is None)
            if completed or progress.step % config.preview_every == 0:
                _preview(run, progress)
            if last:
                run.checkpoints.finish()
        except NonFiniteError as error:
            run.guard.check_may_roll_back(progress.guard, str(error))
            progress, save_due = _roll_back(run, progress, str(error)), False
        run.heartbeat()
    _check_last_steps_were_taken(run, config, progress)
    return progress


def train_step(run: TrainingComponents, config: LoopConfig, progress: Progress) -> _StepResult:
    """Compute the next optimiser step, and take it unless the guard skips it. All ranks call it."""
    started = time.perf_counter()
    samples = progress.samples + config.batch_size
    lr = learning_rate(config.optim, samples, config.total_samples)

    batches = StepBatches(run.batches, run.timer)
    gradients = run.gradients.compute(batches)
    overheads_s = run.timer.lap()
    loss, overheads_s["data"], stop = _exchange(run, progress, batches, gradients, overheads_s["data"])
    decision = _check_step(run, progress, batches, gradients, loss)

    if decision.skipped is None:
        run.engine.step(group_lrs(config.optim, lr), decision.numbers.grad_norm)
    else:
        run.engine.discard_gradients()
    loss_terms = run.objective.end_step(decision.numbers.terms)
    run.ema.update(run.engine.local_shards(), samples, config.batch_size)
    progress = progress.advance(batches.cursor, config.batch_size, decision.guard)

    clip_ids = all_gather_objects(list(gradients.clip_ids)) if decision.fault is not None else []
    step_s = time.perf_counter() - started
    run.metrics.log(
        StepMetrics(
            step=progress.step,
            samples=progress.samples,
            loss=decision.numbers.loss,
            lr=lr,
            grad_norm=decision.numbers.grad_norm,
            clips_per_s=config.batch_size / step_s,
            step_s=step_s,
            overheads_s=overheads_s,
            skipped=decision.guard.skipped,
            hardware_faults=decision.guard.hardware_faults,
            terms=loss_terms,
        )
    )
    if decision.fault is not None:
        taken = decision.skipped is None
        run.metrics.log_fault(progress.step, decision.fault, clip_ids, decision.cause, taken)
    if decision.cause is not None and config.exclude_bad_nodes:
        run.stop.failing_nodes |= decision.cause.nodes
    return _StepResult(progress, decision.skipped, stop or bool(run.stop.failing_nodes))


def _exchange(
    run: TrainingComponents, progress: Progress, batches: StepBatches, gradients: StepGradients, data_s: float
) -> tuple[float, float, bool]:
    """Read the numbers of a step from the device, and exchange them among the ranks: one reduction a step.

    Args:
        data_s: seconds that this rank has waited for data.

    Returns:
        Mean loss over all ranks, mean wait over all ranks, and True if any rank was asked to stop.

    Raises:
        SharedError: another restart has acquired the run folder, or too many samples cannot be read.
    """
    # Rank 0 writes the files, so it checks that this restart still owns the run folder.
    fenced = run.rank == 0 and run.checkpoints.is_fenced()
    loss, data_s, asked, num_faults, any_fenced = all_reduce_mean(
        [gradients.numbers.loss, data_s, float(run.stop.asked), float(len(batches.faults)), float(fenced)]
    )
    if any_fenced:
        broadcast_from_rank0(run.checkpoints.check_not_fenced)
    if num_faults:
        faults, step = all_gather_objects(batches.faults), progress.step + 1
        raise_on_all_ranks(partial(run.quarantine.add, faults, step, write=run.rank == 0))
    return loss, data_s, asked > 0


def _check_step(
    run: TrainingComponents, progress: Progress, batches: StepBatches, gradients: StepGradients, loss: float
) -> _GuardDecision:
    """Check a step by the guard. If it is out of bounds, compute it again: bad data give the same numbers,
    failing hardware does not."""
    numbers = replace(gradients.numbers, loss=loss)
    fault, guard = run.guard.check(progress.guard, loss, numbers.grad_norm)
    tolerance = run.guard.config.recompute_tolerance
    if fault is None or not tolerance:
        return _GuardDecision(numbers, guard, fault, skipped=fault)
    again, cause = run.gradients.recompute(batches.read, gradients, tolerance)
    if not cause.hardware:
        numbers = replace(numbers, terms=again.numbers.terms)
        return _GuardDecision(numbers, guard, fault, skipped=fault, cause=cause)
    (loss,) = all_reduce_mean([again.numbers.loss])
    numbers = replace(again.numbers, loss=loss)
    skipped, guard = run.guard.check(progress.guard.with_hardware_fault(), loss, numbers.grad_norm)
    return _GuardDecision(numbers, guard, fault, skipped, cause)


def _evaluate(run: TrainingComponents, evaluation: Evaluation, progress: Progress) -> None:
    with run.timer("evaluation"):
        result = evaluation.measure(run.engine, run.ema)
    broadcast_from_rank0(run.checkpoints.check_not_fenced)
    run.metrics.log_evaluation(progress.step, progress.samples, result)
    run.metrics.log_weights(progress.step, run.engine.local_shards())


def _save(run: TrainingComponents, progress: Progress, due: bool, taken: bool) -> bool:
    """Advance the pending save, and begin the one that is due.

    Returns:
        True if a save is still due.
    """
    with run.timer("checkpoint"):
        run.checkpoints.poll_pending_save(taken)
        # After a skipped step the weights are doubtful: the save waits for a step that is taken.
        if due and taken:
            run.checkpoints.save(progress, run.engine, run.ema, run.objective, run.settings)
    return due and not taken


def _preview(run: TrainingComponents, progress: Progress) -> None:
    with run.timer("preview"):
        preview = run.previews.make(progress.step, run.engine, run.ema)
    if preview is not None:
        run.metrics.log_preview(progress.step, preview)


def _roll_back(run: TrainingComponents, progress: Progress, reason: str) -> Progress:
    """Load the newest proven checkpoint. The data order continues: the bad clips are not seen again."""
    saved = run.checkpoints.reload(run.engine, run.ema, run.objective, reason)
    run.metrics.print_line(f"step {progress.step}  {reason}")
    run.metrics.log_rollback(saved.step, progress.step)
    return progress.rolled_back(saved)


def _check_last_steps_were_taken(run: TrainingComponents, config: LoopConfig, progress: Progress) -> None:
    """Check that the last steps were taken. If the run was stopped among skipped steps, print a note.

    Raises:
        SharedError: the run has reached its last step, and that step was skipped.
    """
    if (skipped := progress.guard.consecutive_skips) == 0:
        return
    if progress.step == config.total_steps:
        raise SharedError(
            f"the run has reached run.steps={config.total_steps} with its last {skipped} steps skipped, so "
            f"nothing is saved after step {progress.step - skipped}; logs/skipped.jsonl says why. Lower "
            "optim.lr, or widen guard.loss_factor and guard.norm_factor, or give it more run.steps"
        )
    run.metrics.print_line(
        f"step {progress.step}  not saved, because the last {skipped} steps were skipped: the same command "
        "resumes from the newest checkpoint before them"
    )
