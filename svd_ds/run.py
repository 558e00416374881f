"""Assembly: RunConfig -> components of a run -> training loop.

1. Inputs, read and checked (inputs.py), and the task: the network and its objective (tasks.py).
2. Engine: network built in ZeRO-3 shards, activation checkpointing, leaf modules, initial weights.
3. EMA, and the checkpoint to resume from.
4. The training loop (training/loop.py).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
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
from svd_ds.parallel.collectives import broadcast_from_rank0, raise_on_all_ranks
from svd_ds.parallel.engine import Engine
from svd_ds.parallel.env import Env
from svd_ds.parallel.gpu_settings import configure_gpu
from svd_ds.parallel.groups import ParallelDims, create_groups
from svd_ds.parallel.local_norm import LocalNorm
from svd_ds.parallel.process_group import process_group
from svd_ds.parallel.recompute import apply_recompute
from svd_ds.parallel.zero import deepspeed_config
from svd_ds.plan.auto import resolve_batch
from svd_ds.plan.memory_check import start_memory_check
from svd_ds.plan.requests import profile_rank_steps
from svd_ds.run_folder import RunFolder
from svd_ds.run_summary import end_summary, start_summary
from svd_ds.tasks import Task, choose_kernels_on_all_ranks, read_task
from svd_ds.training.ema import ShardEMA
from svd_ds.training.evaluate import Evaluation, as_eval_objective
from svd_ds.training.git_version import code_version
from svd_ds.training.gradients import GradientComputation
from svd_ds.training.guard import Guard
from svd_ds.training.loop import LoopConfig, TrainingComponents, train
from svd_ds.training.metrics import Metrics
from svd_ds.training.null_metrics import NullMetrics
from svd_ds.training.objectives.diffusion import DiffusionObjective
from svd_ds.training.optim import parameter_groups
from svd_ds.training.prefetch import Prefetcher
from svd_ds.training.preview import Previews
from svd_ds.training.progress import Progress
from svd_ds.training.resume import Resume
from svd_ds.training.shared_folder import check_shared_folder
from svd_ds.training.usage import MfuCounter, StageTimer, device_peak_flops, unet_forward_flops
from svd_ds.weights.restarts import restarts_damage


def run(config: RunConfig, env: Env, session: RankSession | None = None) -> Progress:
    """Train with `config`, on the rank of this process. All ranks call it, with the same config.

    Args:
        session: receives the heartbeat of every step, and records how the run ends; None in tests and tools.

    Returns:
        The progress at the end.

    Raises:
        ValueError, OSError: a user's mistake, in one sentence; SharedError if all ranks know of it.
    """
    # The outcome is recorded before the communicators are destroyed, which may take long.
    outcome = session.record_outcome() if session is not None else nullcontext()
    fixed_shapes = len(config.data.shapes) == 1
    with process_group(env, config.watchdog.collective_timeout), outcome:
        configure_gpu(env.device, deterministic=config.deterministic, fixed_shapes=fixed_shapes)
        check_shared_folder(Path(config.run.dir), env)
        resume = find_resume(config, env)
        batch, batch_note = resolve_batch(config, env, profile_rank_steps(env))
        inputs = raise_on_all_ranks(lambda: read_inputs(config, env, resume.path, batch))
        kernels = choose_kernels_on_all_ranks(config, env, inputs.precision)
        task = raise_on_all_ranks(lambda: read_task(config, env, inputs, kernels))
        return _train(config, env, resume, inputs, task, session, batch_note)


def _train(
    config: RunConfig, env: Env, resume: Resume, inputs: Inputs, task: Task, session: RankSession | None,
    batch_note: str
) -> Progress:  # fmt: skip
    checkpoints, folder = inputs.checkpoints, inputs.folder
    damaged_restarts = broadcast_from_rank0(lambda: restarts_damage(checkpoints.folder))
    checkpoints.start_session(inputs.progress.step, resume.origin)
    # After start_session: from here on no earlier process of this run can write.
    damage = broadcast_from_rank0(
        lambda: folder.open(_settings(config, inputs), inputs.progress.step, checkpoints.check_not_fenced)
    )
    if session is not None:
        session.set_fencing_token(checkpoints.token, checkpoints.is_fenced)
    engine = build_engine(config, env, inputs.precision, task)
    new = engine.load_full(task.weights) if task.weights is not None else []
    ema = ShardEMA(config.ema, engine.local_shards())
    if inputs.resume is not None:
        checkpoints.load(inputs.resume, engine, ema, task.objective)

    started = time.perf_counter()
    # Closing W&B, the outermost context, may take long: the outcome of the run is recorded before.
    outcome = session.record_outcome() if session is not None else nullcontext()
    stop = StopRequest(_print_from_signal_handler if env.rank == 0 else lambda text: None)
    opened = raise_on_all_ranks(lambda: _open_metrics(config, env, inputs, engine, stop))
    with stop, opened as metrics, outcome, checkpoints:
        notes = [metrics.wandb_status(), resume.note, batch_note, *inputs.loader.notes, *task.notes]
        notes += engine.notes
        metrics.print_line("\n".join([start_summary(config, env, inputs, engine), *filter(None, notes)]))
        if damaged_restarts is not None:
            damage.insert(0, f"{damaged_restarts}; a copy was kept next to it")
        for sentence in damage:
            metrics.print_line(f"warning: {sentence}")
        if new:
            source = config.init.source
            metrics.print_line(f"{len(new)} tensors are not in {source} and are initialised: {new[0]}, ...")
        components = _components(config, env, inputs, task, engine, ema, stop, metrics, session)
        # Decided on rank 0: a shared file system may show the ranks different files.
        managed = broadcast_from_rank0(lambda: session is not None and session.is_managed_by_job())
        with components.batches:
            progress = train(components, _loop_config(config, managed), inputs.progress)
        broadcast_from_rank0(checkpoints.check_not_fenced)
        if env.rank == 0:
            _write_report(inputs.folder, metrics)
        metrics.print_line(end_summary(config, inputs.folder, progress, stop, time.perf_counter() - started))
        metrics.print_wall_time()
        if session is not None:
            finished = progress.step == config.run.steps
            session.record_end(finished, stop.interrupted, stop.by_keyboard, stop.failing_nodes)
    return progress


def _components(
    config: RunConfig, env: Env, inputs: Inputs, task: Task,
    engine: Engine, ema: ShardEMA, stop: StopRequest, metrics: NullMetrics, session: RankSession | None
) -> TrainingComponents:  # fmt: skip
    loader, max_share = inputs.loader, config.data.max_quarantined
    return TrainingComponents(
        rank=env.rank,
        engine=engine,
        gradients=GradientComputation(engine, task.objective, LocalNorm(engine.module), env.rank, env.device),
        objective=task.objective,
        ema=ema,
        batches=Prefetcher(iter(loader), loader.pop_faults, task.objective.draw, env.device),
        quarantine=Quarantine(max_share, loader.quarantine.num_samples, inputs.folder.quarantine),
        guard=Guard(config.guard),
        checkpoints=inputs.checkpoints,
        settings=task.settings,
        evaluation=_evaluation(config, env, inputs, task),
        previews=_previews(config, env, inputs, task),
        stop=stop,
        timer=StageTimer(),
        heartbeat=_after_step(config, env, inputs, metrics, session),
        metrics=metrics,
    )


def _after_step(
    config: RunConfig, env: Env, inputs: Inputs, metrics: NullMetrics, session: RankSession | None
) -> Callable[[], None]:
    """Return what is called after each step: the watchdog's heartbeat, and on rank 0 the check of memory."""
    calls = [session.watchdog.heartbeat] if session is not None else []
    if env.rank == 0 and (check := start_memory_check(config, env, inputs.loader.split, metrics.print_line)):
        calls.append(check.after_step)

    def after_step() -> None:
        for call in calls:
            call()

    return after_step


def _print_from_signal_handler(text: str) -> None:
    """Write to stdout without its buffer, which the signal may have interrupted."""
    with suppress(OSError, ValueError):
        os.write(sys.stdout.fileno(), f"\n{text}\n".encode())


def _previews(config: RunConfig, env: Env, inputs: Inputs, task: Task) -> Previews:
    return Previews(
        inputs.preview_clips, task.preview_fn, task.preview_metrics, config.sampling.fps,
        inputs.folder, env, inputs.checkpoints.check_not_fenced
    )  # fmt: skip


def _write_report(folder: RunFolder, metrics: NullMetrics) -> None:
    try:
        write_report([folder.path], folder.report)
    except (ValueError, OSError) as error:
        # All steps are done and saved: a missing report is no reason to fail the run.
        metrics.print_line(f"warning: {folder.report} cannot be written: {error}")


def _settings(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """Return the resolved config for config.yaml and W&B."""
    return config.as_dict() | {"contents": inputs.contents, "code": code_version()}


def _loop_config(config: RunConfig, managed_by_job: bool) -> LoopConfig:
    return LoopConfig(
        total_steps=config.run.steps,
        batch_size=config.batch.size,
        optim=config.optim,
        checkpoint_every=config.checkpoint.every,
        preview_every=config.sampling.every,
        evaluate_every=config.evaluation.every,
        exclude_bad_nodes=managed_by_job,
    )


def _evaluation(config: RunConfig, env: Env, inputs: Inputs, task: Task) -> Evaluation | None:
    if inputs.fixed_set is None:
        return None
    assert isinstance(task.objective, DiffusionObjective), "only the diffusion objective has noise levels"
    return Evaluation(
        config=config.evaluation,
        fixed_set=inputs.fixed_set,
        micro_batch=inputs.loader.micro_batch,
        diffusion=as_eval_objective(task.objective),
        env=env,
    )


def _open_metrics(
    config: RunConfig, env: Env, inputs: Inputs, engine: Engine, stop: StopRequest
) -> NullMetrics:
    if env.rank != 0:
        return NullMetrics()
    inputs.checkpoints.check_not_fenced()
    return Metrics(
        inputs.folder, config.logger, _settings(config, inputs), config.run.steps, inputs.progress.step,
        _mfu_counter(config, env), parameter_tags(engine.module), stop.interrupt,
        inputs.checkpoints.check_not_fenced
    )  # fmt: skip


def _mfu_counter(config: RunConfig, env: Env) -> MfuCounter | None:
    """Return the MFU counter; None for an unknown GPU, for a decoder, and if clips differ in shape."""
    peak = device_peak_flops(env.device)
    if peak is None or config.task != "unet" or config.data.buckets:
        return None
    data = config.data
    forward = unet_forward_flops(
        config.model, data.num_frames, data.height, data.width, config.conditioning.num_tokens
    )
    return MfuCounter(flops_per_clip=3 * forward, peak_flops=env.world * peak)


def build_engine(config: RunConfig, env: Env, precision: str, task: Task) -> Engine:
    """Build the sharded network and its optimizer. The order matters:

    1. process groups, before the network, whose parameters are sharded over them as they are created;
    2. LoRA adapters inside `task.build`, so that they are sharded with the network;
    3. activation checkpointing before the engine, whose hooks must be outside it;
    4. leaf modules inside the engine, so that the parameters of a block are gathered in one message.

    Args:
        precision: bf16 or fp32.
    """
    mpu = create_groups(ParallelDims(env.world), config.watchdog.collective_timeout)
    zero = deepspeed_config(config.parallel, precision=precision, gradient_clip=config.optim.gradient_clip)
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
        fast_host_loops=config.parallel.fast_host_loops,
    )


def _optimizer_groups(config: RunConfig, network: UNet | Decoder, task: Task) -> list[dict[str, Any]]:
    with torch.device("meta"):
        # ZeRO-3 has replaced the parameters of the sharded network by empty tensors.
        shapes = {name: parameter.shape for name, parameter in task.build().named_parameters()}
    tags = {name: tag for name, tag in parameter_tags(network).items() if task.is_trainable(name)}
    parameters = dict(network.named_parameters())
    return [
        {
            "name": group.name,
            "weight_decay": group.weight_decay,
            "params": [parameters[name] for name in group.parameter_names],
        }
        for group in parameter_groups(tags, shapes, config.optim)
    ]
