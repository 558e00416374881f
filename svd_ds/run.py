"""Assembly: from a RunConfig to the parts of a run, in the order in which they need each other.

1. what may be wrong with the input: run folder, data, frozen parts, shapes that must fit each other
2. the network: made in shards, activations recomputed, blocks gathered whole, weights read
3. the averages, the checkpoint that the run goes on from
4. the loop
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from svd_ds.batch import Batch
from svd_ds.config import RunConfig
from svd_ds.data.cursor import Cursor
from svd_ds.data.loader import Loader
from svd_ds.diffusion.noise import build_noise
from svd_ds.evaluation.report import write_report
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.conditioner import Conditioner
from svd_ds.model.unet import UNet, parameter_tags
from svd_ds.model.weights import read_weights
from svd_ds.parallel import env as environment
from svd_ds.parallel.collectives import agreed
from svd_ds.parallel.engine import Engine
from svd_ds.parallel.env import Env
from svd_ds.parallel.groups import ParallelDims, create_groups, destroy_groups
from svd_ds.parallel.recompute import apply_recompute
from svd_ds.parallel.zero import deepspeed_config
from svd_ds.training.checkpoint import Checkpoints
from svd_ds.training.ema import ShardEMA
from svd_ds.training.folder import RunFolder
from svd_ds.training.loop import Parts, Plan, train
from svd_ds.training.metrics import Metrics
from svd_ds.training.optim import parameter_groups
from svd_ds.training.preempt import StopRequest
from svd_ds.training.preview import Previews
from svd_ds.training.state import Progress
from svd_ds.training.step import Diffusion

TINY = Path(__file__).parent / "assets" / "tiny_svd"
"""The frozen parts that ship with the package, in the layout of the public pipeline."""


@dataclass(frozen=True)
class Inputs:
    """What a run reads before it computes: everything here is checked."""

    folder: RunFolder
    checkpoints: Checkpoints
    resume: Path | None
    progress: Progress
    loader: Loader
    preview_clips: Batch
    autoencoder: Autoencoder
    conditioner: Conditioner
    precision: str


def run(config: RunConfig, env: Env) -> None:
    """Train as the config says, on this process's rank. All ranks call it, with the same config."""
    environment.init(env)
    try:
        inputs = agreed(lambda: read_inputs(config, env))
        _train(config, env, inputs)
        destroy_groups()
    finally:
        environment.shutdown()


def read_inputs(config: RunConfig, env: Env) -> Inputs:
    """Open and check everything that the run reads. Raises ValueError or OSError with one sentence."""
    config.batch.accumulation(env.world)
    folder = RunFolder(Path(config.run.dir))
    folder.check_belongs(config.as_dict())
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint, env)
    resume = _resume_from(config.run.resume, checkpoints)
    progress = Progress.read(resume / "state.json") if resume else None

    loader = _loader(config, env, progress.cursor if progress else None)
    precision = config.run.precision
    if precision == "auto":
        precision = "bf16" if environment.supports_bf16(env.device) else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    frozen = str(TINY) if config.frozen.path == "tiny" else config.frozen.path
    inputs = Inputs(
        folder=folder,
        checkpoints=checkpoints,
        resume=resume,
        progress=progress or Progress(loader.cursor),
        loader=loader,
        preview_clips=_preview_clips(config),
        autoencoder=Autoencoder.load(frozen, env.device, dtype, chunk=config.frozen.chunk),
        conditioner=Conditioner.load(config.conditioning, frozen, env.device, dtype),
        precision=precision,
    )
    check_fit(config, inputs)
    return inputs


def check_fit(config: RunConfig, inputs: Inputs) -> None:
    """Refuse a network that does not fit its frozen parts, conditions or data, with both numbers."""
    latent, concat = inputs.autoencoder.latent_channels, inputs.conditioner.concat_channels(inputs.autoencoder)
    if config.model.in_channels != latent + concat:
        raise ValueError(
            f"model.in_channels is {config.model.in_channels}, but the autoencoder's {latent} latent channels and "
            f"conditioning.concat={config.conditioning.concat} make {latent + concat}"
        )
    if config.model.context_width != inputs.conditioner.context_width:
        raise ValueError(
            f"model.context_width is {config.model.context_width}, but the encoder in {config.frozen.path} gives "
            f"tokens of width {inputs.conditioner.context_width}"
        )
    if config.model.num_scalars != inputs.conditioner.num_scalars:
        raise ValueError(
            f"model.num_scalars is {config.model.num_scalars}, but conditioning.scalars names "
            f"{inputs.conditioner.num_scalars}: {', '.join(config.conditioning.scalars)}"
        )
    multiple = inputs.autoencoder.downsampling * config.model.size_multiple
    for name, size in (("height", config.data.height), ("width", config.data.width)):
        if size % multiple:
            raise ValueError(f"data.{name} is {size}: this network takes multiples of {multiple} pixels")


def _train(config: RunConfig, env: Env, inputs: Inputs) -> None:
    engine = build_engine(config, env, inputs.precision)
    if inputs.resume is None and config.init.weights is not None:
        engine.load_full(_initial_weights(config))
    ema = ShardEMA(config.ema, engine.local_shards())
    if inputs.resume is not None:
        inputs.checkpoints.load(inputs.resume, engine, ema)

    if env.rank == 0:
        inputs.folder.open(config.as_dict(), inputs.progress.step)
    environment.barrier()
    started = time.perf_counter()
    with _open_metrics(config, env, inputs) as metrics:
        if metrics is not None:
            metrics.say(_opening(config, env, inputs, engine))
        parts = Parts(
            engine=engine,
            ema=ema,
            unet=config.model,
            diffusion=Diffusion(
                noise=build_noise(config.noise, config.data.height, config.data.width),
                offset_noise=config.noise.offset_noise,
                autoencoder=inputs.autoencoder,
                conditioner=inputs.conditioner,
                seed=config.run.seed,
            ),
            batches=iter(inputs.loader),
            checkpoints=inputs.checkpoints,
            previews=_previews(config, env, inputs),
            stop=StopRequest(),
            metrics=metrics,
            device=env.device,
        )
        progress = train(parts, _plan(config, env), inputs.progress)
        if metrics is not None:
            write_report([inputs.folder.path], inputs.folder.report)
            metrics.say(_closing(config, inputs.folder, progress, time.perf_counter() - started))


def _plan(config: RunConfig, env: Env) -> Plan:
    return Plan(
        total_steps=config.run.steps,
        batch_size=config.batch.size,
        accumulation=config.batch.accumulation(env.world),
        optim=config.optim,
        checkpoint_every=config.checkpoint.every,
        preview_every=config.sampling.every,
    )


def _previews(config: RunConfig, env: Env, inputs: Inputs) -> Previews:
    return Previews(
        config.sampling, inputs.preview_clips, inputs.autoencoder, inputs.conditioner, inputs.folder, env
    )


def _open_metrics(config: RunConfig, env: Env, inputs: Inputs) -> AbstractContextManager[Metrics | None]:
    if env.rank != 0:
        return nullcontext()
    return Metrics(inputs.folder, config.logger, config.as_dict(), config.run.steps, inputs.progress.step)


def build_engine(config: RunConfig, env: Env, precision: str) -> Engine:
    """The sharded network and its optimiser. The order matters:

    groups before the network, which is cut into shards over them as it is made;
    recomputation before the engine, whose hooks must lie outside it;
    leaf blocks inside the engine, so that a block's parameters travel as one.
    """
    mpu = create_groups(ParallelDims(env.world))
    zero = deepspeed_config(
        config.parallel,
        precision=precision,
        micro_batch=config.batch.size // env.world // config.batch.accumulation(env.world),
        accumulation=config.batch.accumulation(env.world),
        gradient_clip=config.optim.gradient_clip,
    )
    torch.manual_seed(config.run.seed)
    with Engine.sharded_init(zero, mpu):
        unet = UNet(config.model)
    apply_recompute(unet, unet.blocks(), config.recompute)
    return Engine(
        unet,
        _optimizer_groups(config, unet),
        zero,
        mpu,
        leaves=unet.blocks().values(),
        betas=(config.optim.beta1, config.optim.beta2),
        eps=config.optim.eps,
    )


def _optimizer_groups(config: RunConfig, unet: UNet) -> list[dict[str, Any]]:
    with torch.device("meta"):
        # Parameters of the sharded network have no shape of their own any more.
        shapes = {name: parameter.shape for name, parameter in UNet(config.model).named_parameters()}
    parameters = dict(unet.named_parameters())
    return [
        {
            "name": group.name,
            "weight_decay": group.weight_decay,
            "params": [parameters[name] for name in group.members],
        }
        for group in parameter_groups(parameter_tags(unet), shapes, config.optim)
    ]


def _resume_from(resume: str, checkpoints: Checkpoints) -> Path | None:
    if resume == "auto":
        return checkpoints.latest()
    if resume == "never":
        if latest := checkpoints.latest():
            raise ValueError(f"run.resume is never, but the run folder has {latest}; name another with run.dir=...")
        return None
    path = Path(resume)
    if not (path / "state.json").exists():
        raise ValueError(f"run.resume is {resume!r}: neither auto nor never, nor a checkpoint folder")
    return path


def _loader(config: RunConfig, env: Env, cursor: Cursor | None) -> Loader:
    accumulation = config.batch.accumulation(env.world)
    return Loader(
        config.data,
        seed=config.run.seed,
        rank=env.rank,
        world=env.world,
        global_batch=config.batch.size,
        micro_batch=config.batch.size // env.world // accumulation,
        cursor=cursor,
    )


def _preview_clips(config: RunConfig) -> Batch:
    """The first clips of the order, whole frames: the same for every rank and every life of the run."""
    count = config.sampling.num_videos
    centred = replace(config.data, crop="center", flip=False, num_workers=0)
    loader = Loader(centred, config.run.seed, rank=0, world=1, global_batch=count, micro_batch=count)
    clips, _ = next(iter(loader))
    return clips


def _initial_weights(config: RunConfig) -> Any:
    _, tensors = read_weights(Path(config.init.weights or ""), which=config.init.which)
    return tensors


def _opening(config: RunConfig, env: Env, inputs: Inputs, engine: Engine) -> str:
    parameters = sum(shape.numel() for shape in engine.shapes.values())
    begin = f"resuming at step {inputs.progress.step}" if inputs.resume else "starting"
    return (
        f"{begin}: {parameters / 1e6:.1f}M parameters in ZeRO-3 shards over {env.world} {env.device.type} rank"
        f"{'s' if env.world > 1 else ''}, {inputs.precision}; {len(inputs.loader)} clips of {config.data.num_frames} x "
        f"{config.data.height}x{config.data.width}, batch {config.batch.size}; run folder {inputs.folder.path}"
    )


def _closing(config: RunConfig, folder: RunFolder, progress: Progress, seconds: float) -> str:
    if progress.step < config.run.steps:
        return f"stopped at step {progress.step} as asked, with a checkpoint; the same command goes on from there"
    return (
        f"done: {progress.step} steps, this start took {seconds:.0f} s\n"
        f"  report   {folder.report}\n"
        f"  videos   {folder.samples(progress.step)}\n"
        f"  weights  {folder.checkpoints}"
    )
