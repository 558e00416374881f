"""What the loop sets going, and by which plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from svd_ds.batch import Batch
from svd_ds.data.cursor import Cursor
from svd_ds.data.quarantine import Fault, Quarantine
from svd_ds.jobs.signals import StopRequest
from svd_ds.parallel.engine import Engine
from svd_ds.parallel.local_norm import LocalNorm
from svd_ds.training.checkpoint import Checkpoints
from svd_ds.training.checkpoint_files import Settings
from svd_ds.training.ema import ShardEMA
from svd_ds.training.evaluate import Evaluation
from svd_ds.training.guard import Guard
from svd_ds.training.metrics import Metrics
from svd_ds.training.objectives.base import Objective
from svd_ds.training.optim import OptimConfig
from svd_ds.training.preview import Previews
from svd_ds.training.usage import StageTimer


@dataclass(frozen=True)
class LoopConfig:
    """How long, in what portions, and how often the side jobs come."""

    total_steps: int
    batch_size: int
    """Clips a step, over all ranks."""
    optim: OptimConfig
    checkpoint_every: int
    preview_every: int
    evaluate_every: int
    exclude_bad_nodes: bool = False
    """Whether who started the ranks can start them on other nodes: the run then ends at a failing one."""


@dataclass(frozen=True)
class TrainingComponents:
    rank: int
    engine: Engine
    local_norm: LocalNorm
    ema: ShardEMA
    settings: Settings
    objective: Objective
    batches: Iterator[tuple[Batch, Cursor]]
    pop_faults: Callable[[], list[Fault]]
    """What was replaced in this rank's batches since the last call."""
    quarantine: Quarantine
    """Of all ranks."""
    guard: Guard
    checkpoints: Checkpoints
    evaluation: Evaluation | None
    """None where nothing is evaluated."""
    previews: Previews
    stop: StopRequest
    clock: StageTimer
    heartbeat: Callable[[], None]
    """Tells the watchdog that a step is done."""
    metrics: Metrics | None
    """Rank 0's; None elsewhere."""
    device: torch.device
