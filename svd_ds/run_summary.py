"""Lines that a run prints at its start and at its end."""

from __future__ import annotations

from svd_ds.config import RunConfig
from svd_ds.inputs import Inputs
from svd_ds.jobs.signals import StopRequest
from svd_ds.parallel.engine import Engine
from svd_ds.parallel.env import Env
from svd_ds.run_folder import RunFolder
from svd_ds.training.progress import Progress


def start_summary(config: RunConfig, env: Env, inputs: Inputs, engine: Engine) -> str:
    """Return the line at the start of a run: its size, ranks, clips and folder."""
    millions = sum(shape.numel() for shape in engine.shapes.values()) / 1e6
    shapes = " or ".join(f"{s.num_frames} x {s.height}x{s.width}" for s in config.data.shapes)
    action = f"resuming at step {inputs.progress.step}" if inputs.resume else "starting"
    return (
        f"{action}: {millions:.1f}M parameters in ZeRO-3 shards, ranks: {env.world} x {env.device.type}, "
        f"{inputs.precision}; {len(inputs.loader)} clips of {shapes}, "
        f"batch {config.batch.size}; run folder {inputs.folder.path}"
    )


def end_summary(
    config: RunConfig, folder: RunFolder, progress: Progress, stop: StopRequest, seconds: float
) -> str:
    """Return the lines at the end: the step that was reached, and where the results are.

    Args:
        seconds: duration of this restart.
    """
    if progress.step < config.run.steps and stop.failing_nodes:
        return f"stopped at step {progress.step}: the job is requeued without {', '.join(stop.failing_nodes)}"
    if progress.step < config.run.steps:
        return f"stopped at step {progress.step} as asked; the same command resumes from there"
    return (
        f"done: {progress.step} steps, this restart took {seconds:.0f} s\n"
        f"  report   {folder.report}\n"
        f"  videos   {folder.samples(progress.step)}\n"
        f"  weights  {folder.checkpoints}"
    )
