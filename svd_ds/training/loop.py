"""The order in which a run does things. No tensor arithmetic here: each line names who does it."""

from __future__ import annotations

import time
from functools import partial

from svd_ds.parallel.collectives import SharedError, agreed, items_of_ranks, mean_over_ranks, told_by_first
from svd_ds.training.checkpoint import NonFiniteError
from svd_ds.training.metrics import StepMetrics
from svd_ds.training.optim import group_rates, learning_rate
from svd_ds.training.parts import Parts, Plan
from svd_ds.training.state import Progress


def train(parts: Parts, plan: Plan, progress: Progress) -> Progress:
    """Train from `progress` to the plan's last step, or until the ranks are asked to stop; return where it
    ended."""
    stopped = due = False
    while progress.step < plan.total_steps and not stopped:
        started = time.perf_counter()
        losses: list[float] = []
        clips: list[str] = []
        samples = progress.samples + plan.batch_size
        lr = learning_rate(plan.optim, samples, plan.total_steps * plan.batch_size)

        accumulation = 1
        while len(losses) < accumulation:
            with parts.clock("data"):
                batch, cursor = next(parts.batches)
            accumulation = batch.accumulation
            loss = parts.objective.loss(parts.engine, batch.to(parts.device)).mean()
            parts.engine.backward(loss, accumulation)
            losses.append(loss.item())
            clips += batch.ids
        grad_norm = parts.engine.gradient_norm()
        waits_s, faults = parts.clock.lap(), parts.take_faults()
        # Rank 0 writes the files, so that it looks whether they are still this start's.
        lost = parts.metrics is not None and parts.checkpoints.is_taken_over()
        loss_mean, waits_s["data"], asked, unreadable, taken_over = mean_over_ranks(
            [
                sum(losses) / len(losses),
                waits_s["data"],
                float(parts.stop.asked),
                float(len(faults)),
                float(lost),
            ]
        )
        if taken_over:
            told_by_first(parts.checkpoints.check_still_ours)
        if unreadable:
            faults, step = items_of_ranks(faults), progress.step + 1
            agreed(partial(parts.quarantine.add, faults, step, write=parts.metrics is not None))

        fault, guarded = parts.guard.judge(progress.guard, loss_mean, grad_norm)
        progress = progress.advance(cursor, plan.batch_size, guarded)
        if fault is None:
            parts.engine.step(group_rates(plan.optim, lr))
        else:
            parts.engine.forget()
            clips = items_of_ranks(clips)
        terms = parts.objective.end_step()
        parts.ema.update(parts.engine.local_shards(), samples, plan.batch_size)

        stopped = asked > 0
        step_s = time.perf_counter() - started
        if parts.metrics is not None:
            parts.metrics.log(
                StepMetrics(
                    step=progress.step,
                    samples=progress.samples,
                    loss=loss_mean,
                    lr=lr,
                    grad_norm=grad_norm,
                    clips_per_s=plan.batch_size / step_s,
                    step_s=step_s,
                    waits_s=waits_s,
                    skipped=guarded.skipped,
                    terms=terms,
                )
            )
            if fault is not None:
                parts.metrics.log_skipped(progress.step, fault, clips)

        if parts.guard.must_go_back(guarded):
            why = f"{guarded.in_a_row} steps in a row were skipped, the last because {fault}"
            progress, due = _go_back(parts, progress, why), False
            continue

        last = stopped or progress.step == plan.total_steps
        ended = last and not stopped
        if parts.evaluation is not None and (progress.step % plan.evaluate_every == 0 or ended):
            with parts.clock("evaluation"):
                measured = parts.evaluation.measure(parts.engine, parts.ema)
            told_by_first(parts.checkpoints.check_still_ours)
            if parts.metrics is not None:
                parts.metrics.log_evaluation(progress.step, progress.samples, measured)
                parts.metrics.log_weights(progress.step, parts.engine.local_shards())
        due = due or last or progress.step % plan.checkpoint_every == 0
        try:
            # Behind the evaluation: what is told of a step must be told before a run can go on behind it.
            with parts.clock("checkpoint"):
                parts.checkpoints.settle(taken=fault is None)
                # In a streak of skipped steps the weights are in doubt: the save waits for a taken one.
                if due and fault is None:
                    parts.checkpoints.save(progress, parts.engine, parts.ema, parts.objective, parts.settings)
                    due = False
            if progress.step % plan.preview_every == 0 or ended:
                with parts.clock("preview"):
                    preview = parts.previews.make(progress.step, parts.engine, parts.ema)
                if parts.metrics is not None and preview is not None:
                    parts.metrics.log_preview(progress.step, preview)
            if last:
                parts.checkpoints.finish()
        except NonFiniteError as error:
            parts.guard.check_may_go_back(progress.guard, str(error))
            progress, due = _go_back(parts, progress, str(error)), False
        parts.beat()
    _check_end(parts, plan, progress)
    return progress


def _check_end(parts: Parts, plan: Plan, progress: Progress) -> None:
    """Refuse to call a run done whose last steps were skipped: all ranks see the same numbers.

    Raises:
        SharedError: it has come to its last step that way.
    """
    if (skipped := progress.guard.in_a_row) == 0:
        return
    if progress.step == plan.total_steps:
        raise SharedError(
            f"the run has come to run.steps={plan.total_steps} with its last {skipped} steps skipped, so "
            f"nothing is saved after step {progress.step - skipped}; logs/skipped.jsonl says why. Lower "
            "optim.lr, or widen guard.loss_factor and guard.norm_factor, or give it more run.steps"
        )
    if parts.metrics is not None:
        parts.metrics.say(
            f"step {progress.step}  not saved, for the last {skipped} steps were skipped: the same command "
            "resumes from the newest checkpoint before them"
        )


def _go_back(parts: Parts, progress: Progress, why: str) -> Progress:
    """To the weights of the last good checkpoint. The clips go on: the bad ones are not seen again."""
    saved = parts.checkpoints.reload(parts.engine, parts.ema, parts.objective, why)
    if parts.metrics is not None:
        parts.metrics.say(f"step {progress.step}  {why}")
    if parts.metrics is not None:
        parts.metrics.go_back(saved.step, progress.step)
    return progress.gone_back(saved)
