"""A run of the trainer on one rank, in the process of the test."""

from __future__ import annotations

from pathlib import Path

from svd_ds.compose import compose
from svd_ds.jobs.rank_session import RankSession
from svd_ds.parallel.env import Env
from svd_ds.run_folder import RunFolder
from svd_ds.training.progress import Progress

SMALLEST = (
    "debug=tiny", "precision=fp32", "optim.schedule=constant", "data.num_frames=2", "data.height=32",
    "data.width=32", "evaluation.every=0", "sampling.every=1000000", "sampling.num_steps=1",
    "model.widths=[32]", "model.attention_levels=[true]", "batch.size=1", "ema.lengths=[0.1]",
    "logger.wandb=disabled",
    # A start from other weights or moments then has clearly other losses.
    "optim.lr=1.0e-2", "optim.warmup_samples=1",
)  # fmt: skip


def start(shards: Path, run_dir: Path, *overrides: str) -> Progress:
    """Start a run, or resume it, and train to its end.

    Raises:
        ValueError: the run is refused.
        OSError: a file cannot be read or written.
    """
    from svd_ds.run import run

    config = compose([*SMALLEST, f"data.path={shards}", f"run.dir={run_dir}", *overrides])
    env = Env.read({})
    # With `debug` an error is raised, and not turned into an exit code.
    with RankSession(RunFolder(run_dir), env, config.watchdog, debug=True) as session:
        return run(config, env, session)
