"""Assembly: from a RunConfig to the parts of a run, in the order in which they need each other.

1. the inputs, read and checked (inputs.py), and the task: what is trained (tasks.py)
2. the network: made in shards, activations recomputed, blocks gathered whole, weights read
3. the averages, the checkpoint that the run goes on from
4. the loop
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from svd_ds.config import RunConfig
from svd_ds.data.quarantine import Quarantine
from svd_ds.evaluation.report import write_report
from svd_ds.inputs import Inputs, find_resume, read_inputs
from svd_ds.jobs.rank_session import RankSession
from svd_ds.jobs.signals import StopRequest
from svd_ds.model.decoder import Decoder
from svd_ds.model.unet import UNet, parameter_tags
from svd_ds.parallel import env as environment
from svd_ds.parallel.collectives import broadcast_from_rank0, raise_on_all_ranks
from svd_ds.parallel.engine import Engine
from svd_ds.parallel.env import Env
from svd_ds.parallel.groups import ParallelDims, create_groups, destroy_groups
from svd_ds.parallel.local_norm import LocalNorm
from svd_ds.parallel.recompute import apply_recompute
from svd_ds.parallel.zero import deepspeed_config
from svd_ds.run_folder import RunFolder
from svd_ds.tasks import Task, read_task
from svd_ds.training.ema import ShardEMA
from svd_ds.training.evaluate import Evaluation, as_eval_objective
from svd_ds.training.git_version import code_version
from svd_ds.training.guard import Guard
from svd_ds.training.loop import train
from svd_ds.training.metrics import Metrics
from svd_ds.training.objectives.diffusion import DiffusionObjective
from svd_ds.training.optim import parameter_groups
from svd_ds.training.parts import LoopConfig, TrainingComponents
from svd_ds.training.preview import Previews
from svd_ds.training.progress import Progress
from svd_ds.training.resume import Resume
from svd_ds.training.shared_folder import check_shared_folder
from svd_ds.training.usage import MfuCounter, StageTimer, peak_of, unet_forward_flops
from svd_ds.weights.restarts import restarts_damage


def run(config: RunConfig, env: Env, attempt: RankSession | None = None) -> Progress:
    """Train as the config says, on this process's rank, and tell where it ended. All ranks call it, with the
    same config; `restart_id`: told of every step and of the end."""
    environment.init(env, config.watchdog.patience)
    try:
        check_shared_folder(Path(config.run.dir), env)
        resume = find_resume(config, env)
        inputs = raise_on_all_ranks(lambda: read_inputs(config, env, resume.path))
        task = raise_on_all_ranks(lambda: read_task(config, env, inputs))
        progress = _train(config, env, resume, inputs, task, attempt)
        destroy_groups()
    finally:
        environment.shutdown()
    return progress


def _train(
    config: RunConfig, env: Env, resume: Resume, inputs: Inputs, task: Task, attempt: RankSession | None
) -> Progress:
    checkpoints, folder = inputs.checkpoints, inputs.folder
    lives = broadcast_from_rank0(lambda: restarts_damage(checkpoints.folder))
    checkpoints.start_session(inputs.progress.step, resume.origin)
    # At once: the sooner the files are this start's, the less an earlier one still writes there.
    damage = broadcast_from_rank0(
        lambda: folder.open(_settings(config, inputs), inputs.progress.step, checkpoints.check_not_fenced)
    )
    if attempt is not None:
        attempt.set_fencing_token(checkpoints.token, checkpoints.is_fenced)
    engine = build_engine(config, env, inputs.precision, task)
    new = engine.load_full(task.weights) if task.weights is not None else []
    ema = ShardEMA(config.ema, engine.local_shards())
    if inputs.resume is not None:
        checkpoints.load(inputs.resume, engine, ema, task.objective)

    quarantine = Quarantine(
        config.data.max_quarantined, inputs.loader.quarantine.num_samples, inputs.folder.quarantine
    )
    started = time.perf_counter()
    # W&B is left last, which may take long: by then it is told how the run ended.
    outcome = attempt.record_outcome() if attempt is not None else nullcontext()
    stop = StopRequest(_say_at_once if env.rank == 0 else lambda text: None)
    opened = raise_on_all_ranks(lambda: _open_metrics(config, env, inputs, engine, stop))
    with stop, opened as metrics, outcome, checkpoints:
        if metrics is not None:
            notes = [metrics.tracking(), resume.note, *inputs.loader.notes, *task.notes]
            metrics.print_line("\n".join([_opening(config, env, inputs, engine), *filter(None, notes)]))
            for sentence in filter(None, (lives, *damage)):
                metrics.print_line(f"warning: {sentence}")
            if new:
                source = config.init.source
                metrics.print_line(f"{len(new)} tensors are not in {source} and start afresh: {new[0]}, ...")
        parts = TrainingComponents(
            rank=env.rank,
            engine=engine,
            local_norm=LocalNorm(engine.module),
            ema=ema,
            settings=task.settings,
            objective=task.objective,
            batches=iter(inputs.loader),
            pop_faults=inputs.loader.pop_faults,
            quarantine=quarantine,
            guard=Guard(config.guard),
            checkpoints=checkpoints,
            evaluation=_evaluation(config, env, inputs, task),
            previews=_previews(config, env, inputs, task),
            stop=stop,
            clock=StageTimer(),
            heartbeat=attempt.watchdog.heartbeat if attempt is not None else lambda: None,
            metrics=metrics,
            device=env.device,
        )
        # One rank looks: a shared disk may not show all of them the same.
        of_a_job = broadcast_from_rank0(lambda: attempt is not None and attempt.is_managed_by_job())
        progress = train(parts, _plan(config, of_a_job), inputs.progress)
        broadcast_from_rank0(checkpoints.check_not_fenced)
        if metrics is not None:
            _report(inputs.folder, metrics)
            metrics.print_line(_closing(config, inputs.folder, progress, stop, time.perf_counter() - started))
            metrics.print_line(f"  {metrics.wall_time()}")
        if attempt is not None:
            finished = progress.step == config.run.steps
            attempt.record_end(finished, stop.interrupted, stop.by_keyboard, stop.failing_nodes)
    return progress


def _say_at_once(text: str) -> None:
    """From a signal handler, which must not touch a buffer that it may have interrupted."""
    with suppress(OSError, ValueError):
        os.write(sys.stdout.fileno(), f"\n{text}\n".encode())


def _previews(config: RunConfig, env: Env, inputs: Inputs, task: Task) -> Previews:
    return Previews(
        inputs.preview_clips,
        task.preview_fn,
        task.measures,
        config.sampling.fps,
        inputs.folder,
        env,
        inputs.checkpoints.check_not_fenced,
    )


def _report(folder: RunFolder, metrics: Metrics) -> None:
    try:
        write_report([folder.path], folder.report)
    except (ValueError, OSError) as error:
        # All steps are done and saved: the run is finished without it.
        metrics.print_line(f"warning: {folder.report} cannot be written: {error}")


def _settings(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """As config.yaml and W&B show them."""
    return config.as_dict() | {"contents": inputs.contents, "code": code_version()}


def _plan(config: RunConfig, of_a_job: bool) -> LoopConfig:
    return LoopConfig(
        total_steps=config.run.steps,
        batch_size=config.batch.size,
        optim=config.optim,
        checkpoint_every=config.checkpoint.every,
        preview_every=config.sampling.every,
        evaluate_every=config.evaluation.every,
        exclude_bad_nodes=of_a_job,
    )


def _evaluation(config: RunConfig, env: Env, inputs: Inputs, task: Task) -> Evaluation | None:
    if inputs.fixed_set is None:
        return None
    assert isinstance(task.objective, DiffusionObjective), "only diffusion has noise levels"
    return Evaluation(
        config=config.evaluation,
        fixed_set=inputs.fixed_set,
        micro_batch=inputs.loader.micro_batch,
        diffusion=as_eval_objective(task.objective),
        env=env,
    )


def _open_metrics(
    config: RunConfig, env: Env, inputs: Inputs, engine: Engine, stop: StopRequest
) -> AbstractContextManager[Metrics | None]:
    if env.rank != 0:
        return nullcontext()
    inputs.checkpoints.check_not_fenced()
    return Metrics(
        inputs.folder,
        config.logger,
        _settings(config, inputs),
        config.run.steps,
        inputs.progress.step,
        _speed(config, env),
        parameter_tags(engine.module),
        stop.interrupt,
        inputs.checkpoints.check_not_fenced,
    )


def _speed(config: RunConfig, env: Env) -> MfuCounter | None:
    """None where the device's peak is not known, for a decoder, and where clips differ in shape."""
    peak = peak_of(env.device)
    if peak is None or config.task != "unet" or config.data.buckets:
        return None
    data = config.data
    forward = unet_forward_flops(
        config.model, data.num_frames, data.height, data.width, config.conditioning.num_tokens
    )
    return MfuCounter(clip_flops=3 * forward, peak_flops=env.world * peak)


def build_engine(config: RunConfig, env: Env, precision: str, task: Task) -> Engine:
    """The sharded network and its optimiser. The order matters:

    groups before the network, which is cut into shards over them as it is made, adapters too;
    recomputation before the engine, whose hooks must lie outside it;
    leaf blocks inside the engine, so that a block's parameters travel as one.
    """
    mpu = create_groups(ParallelDims(env.world), config.watchdog.patience)
    zero = deepspeed_config(
        config.parallel,
        precision=precision,
        gradient_clip=config.optim.gradient_clip,
    )
    torch.manual_seed(config.run.seed)
    with Engine.sharded_init(zero, mpu) if task.init_sharded else nullcontext():
        network = task.build()
    apply_recompute(network, network.blocks(), config.recompute)
    return Engine(
        network,
        _optimizer_groups(config, network, task),
        zero,
        mpu,
        leaves=network.blocks().values(),
        betas=(config.optim.beta1, config.optim.beta2),
        eps=config.optim.eps,
    )


def _optimizer_groups(config: RunConfig, network: UNet | Decoder, task: Task) -> list[dict[str, Any]]:
    with torch.device("meta"):
        # Parameters of the sharded network have no shape of their own any more.
        shapes = {name: parameter.shape for name, parameter in task.build().named_parameters()}
    tags = {name: tag for name, tag in parameter_tags(network).items() if task.is_trainable(name)}
    parameters = dict(network.named_parameters())
    return [
        {
            "name": group.name,
            "weight_decay": group.weight_decay,
            "params": [parameters[name] for name in group.members],
        }
        for group in parameter_groups(tags, shapes, config.optim)
    ]


def _opening(config: RunConfig, env: Env, inputs: Inputs, engine: Engine) -> str:
    millions = sum(shape.numel() for shape in engine.shapes.values()) / 1e6
    shapes = " or ".join(f"{s.num_frames} x {s.height}x{s.width}" for s in config.data.shapes)
    begin = f"resuming at step {inputs.progress.step}" if inputs.resume else "starting"
    return (
        f"{begin}: {millions:.1f}M parameters in ZeRO-3 shards, ranks: {env.world} x {env.device.type}, "
        f"{inputs.precision}; {len(inputs.loader)} clips of {shapes}, "
        f"batch {config.batch.size}; run folder {inputs.folder.path}"
    )


def _closing(
    config: RunConfig, folder: RunFolder, progress: Progress, stop: StopRequest, seconds: float
) -> str:
    if progress.step < config.run.steps and stop.failing_nodes:
        nodes = ", ".join(stop.failing_nodes)
        return f"stopped at step {progress.step}: the job is to go on without {nodes}"
    if progress.step < config.run.steps:
        return f"stopped at step {progress.step} as asked; the same command resumes from there"
    return (
        f"done: {progress.step} steps, this start took {seconds:.0f} s\n"
        f"  report   {folder.report}\n"
        f"  videos   {folder.samples(progress.step)}\n"
        f"  weights  {folder.checkpoints}"
    )
