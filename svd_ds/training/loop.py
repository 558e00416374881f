"""The order in which a run does things. No tensor arithmetic here: each line names who does it."""

from __future__ import annotations

import time
from functools import partial

from svd_ds.parallel.collectives import agreed, items_of_ranks, mean_over_ranks
from svd_ds.training.metrics import StepMetrics
from svd_ds.training.optim import group_rates, learning_rate
from svd_ds.training.parts import Parts, Plan
from svd_ds.training.state import Progress


def train(parts: Parts, plan: Plan, progress: Progress) -> Progress:
    """Train from `progress` to the plan's last step, or until the ranks are asked to stop; return where it
    ended."""
    stopped = False
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
        loss_mean, waits_s["data"], asked, unreadable = mean_over_ranks(
            [sum(losses) / len(losses), waits_s["data"], float(parts.stop.asked), float(len(faults))]
        )
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
            progress = _go_back(parts, progress)
            continue

        last = stopped or progress.step == plan.total_steps
        ended = last and not stopped
        if parts.evaluation is not None and (progress.step % plan.evaluate_every == 0 or ended):
            with parts.clock("evaluation"):
                measured = parts.evaluation.measure(parts.engine, parts.ema)
            if parts.metrics is not None:
                parts.metrics.log_evaluation(progress.step, progress.samples, measured)
                parts.metrics.log_weights(progress.step, parts.engine.local_shards())
        # Behind the evaluation: what is told of a step must be told before a run can go on behind it.
        with parts.clock("checkpoint"):
            parts.checkpoints.settle()
            if last or progress.step % plan.checkpoint_every == 0:
                parts.checkpoints.save(progress, parts.engine, parts.ema, parts.objective, parts.settings)
        if progress.step % plan.preview_every == 0 or ended:
            with parts.clock("preview"):
                preview = parts.previews.make(progress.step, parts.engine, parts.ema)
            if parts.metrics is not None and preview is not None:
                parts.metrics.log_preview(progress.step, preview)
        parts.beat()
    parts.checkpoints.finish()
    return progress


def _go_back(parts: Parts, progress: Progress) -> Progress:
    """To the weights of the last checkpoint. The clips go on: the bad ones are not seen again."""
    saved = parts.checkpoints.reload(parts.engine, parts.ema, parts.objective)
    if parts.metrics is not None:
        parts.metrics.go_back(saved.step, progress.step)
    return progress.gone_back(saved)
