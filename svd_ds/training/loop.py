"""The order in which a run does things. No tensor arithmetic here: each line names who does it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from svd_ds.batch import Batch
from svd_ds.data.cursor import Cursor
from svd_ds.parallel.collectives import mean_over_ranks
from svd_ds.parallel.engine import Engine
from svd_ds.training.checkpoint import Checkpoints, Settings
from svd_ds.training.ema import ShardEMA
from svd_ds.training.metrics import Metrics, StepMetrics
from svd_ds.training.objective import Objective
from svd_ds.training.optim import OptimConfig, group_rates, learning_rate
from svd_ds.training.preempt import StopRequest
from svd_ds.training.preview import Previews
from svd_ds.training.state import Progress


@dataclass(frozen=True)
class Plan:
    """How long, in what portions, and how often the side jobs come."""

    total_steps: int
    batch_size: int
    """Clips a step, over all ranks."""
    accumulation: int
    """Micro-batches a rank sees in one step."""
    optim: OptimConfig
    checkpoint_every: int
    preview_every: int


@dataclass(frozen=True)
class Parts:
    """What the loop sets going."""

    engine: Engine
    ema: ShardEMA
    settings: Settings
    objective: Objective
    batches: Iterator[tuple[Batch, Cursor]]
    checkpoints: Checkpoints
    previews: Previews
    stop: StopRequest
    metrics: Metrics | None
    """Rank 0's; None elsewhere."""
    device: torch.device


def train(parts: Parts, plan: Plan, progress: Progress) -> Progress:
    """Train from `progress` to the plan's last step, or until the ranks are asked to stop; return where it
    ended."""
    stopped = False
    while progress.step < plan.total_steps and not stopped:
        started, data_s, losses = time.perf_counter(), 0.0, []
        samples = progress.samples + plan.batch_size
        lr = learning_rate(plan.optim, samples, plan.total_steps * plan.batch_size)

        for _ in range(plan.accumulation):
            waiting = time.perf_counter()
            batch, cursor = next(parts.batches)
            data_s += time.perf_counter() - waiting
            loss = parts.objective.loss(parts.engine, batch.to(parts.device)).mean()
            parts.engine.backward(loss)
            losses.append(loss.item())
        grad_norm = parts.engine.step(group_rates(plan.optim, lr))
        terms = parts.objective.end_step()
        progress = progress.advance(cursor, plan.batch_size)
        parts.ema.update(parts.engine.local_shards(), samples, plan.batch_size)

        loss_mean, data_s, asked = mean_over_ranks(
            [sum(losses) / len(losses), data_s, float(parts.stop.asked)]
        )
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
                    data_s=data_s,
                    terms=terms,
                )
            )

        last = stopped or progress.step == plan.total_steps
        if last or progress.step % plan.checkpoint_every == 0:
            parts.checkpoints.save(progress, parts.engine, parts.ema, parts.objective, parts.settings)
        if progress.step % plan.preview_every == 0 or (last and not stopped):
            written = parts.previews.make(progress.step, parts.engine, parts.ema)
            if parts.metrics is not None and written is not None:
                parts.metrics.log_samples(progress.step, *written)
    return progress
