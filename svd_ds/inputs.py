"""Inputs of a run, read and checked before it computes: run folder, checkpoint, data, frozen networks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svd_ds.checks import check_config_fits, check_sample_scalars, check_scalar_order, check_trainable
from svd_ds.config import RunConfig
from svd_ds.contents import compute_contents
from svd_ds.data.batching import BatchConfig
from svd_ds.data.config import DataConfig
from svd_ds.data.cursor import Cursor
from svd_ds.data.loader import Loader
from svd_ds.data.shared_memory import check_shared_memory
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.conditioner import Conditioner
from svd_ds.parallel.collectives import broadcast_from_rank0
from svd_ds.parallel.env import Env, supports_bf16
from svd_ds.run_folder import RunFolder
from svd_ds.sample import frozen_folder
from svd_ds.training.checkpoint import Checkpoints
from svd_ds.training.evaluate import SEED, FixedSet
from svd_ds.training.optim import TAGS
from svd_ds.training.preview import PreviewClips
from svd_ds.training.progress import Progress
from svd_ds.training.resume import Resume, find_checkpoint
from svd_ds.training.verify import check_checkpoint_on_all_ranks, newest_intact_checkpoint
from svd_ds.weights.source import network_parameters, open_weights


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run, all of them checked."""

    folder: RunFolder
    contents: dict[str, Any]
    """Fingerprints of the weights that the run starts from (svd_ds.contents)."""
    checkpoints: Checkpoints
    resume: Path | None
    """Checkpoint that the run resumes from; None if it begins at step 0."""
    progress: Progress
    loader: Loader
    preview_clips: PreviewClips
    fixed_set: FixedSet | None
    """Clips of the evaluation by noise level; None if there is no evaluation."""
    autoencoder: Autoencoder
    conditioner: Conditioner | None
    """None with task=decoder: the decoder gets only latents."""
    precision: str
    weights: Iterator[tuple[str, Tensor]] | None
    """Initial weights, by name; None if they are random, or come from the checkpoint."""


def open_checkpoints(config: RunConfig, env: Env) -> Checkpoints:
    """Return the checkpoints of the run of `config`."""
    return Checkpoints(RunFolder(Path(config.run.dir)).checkpoints, config.checkpoint, env, config.task)


def find_resume(config: RunConfig, env: Env) -> Resume:
    """Find an intact checkpoint to resume from. All ranks call it.

    Each rank verifies a share of the files. Rank 0 alone lists the checkpoints: while another restart of the
    run still writes, two ranks could find different ones.

    Raises:
        SharedError: run.resume names no checkpoint, or all checkpoints are damaged.
    """
    checkpoints, verify = open_checkpoints(config, env), config.checkpoint.verify
    found = broadcast_from_rank0(lambda: find_checkpoint(checkpoints, config.run.resume))
    if config.run.resume == "auto" or (found.path is not None and found.is_own):
        path = newest_intact_checkpoint(checkpoints.folder, env, verify)
        # Damaged checkpoints have been renamed by now.
        found = broadcast_from_rank0(lambda: find_checkpoint(checkpoints, config.run.resume))
        if found.path == path:
            return found
    if found.path is not None:
        check_checkpoint_on_all_ranks(found.path, env, verify)
    return found


def read_inputs(config: RunConfig, env: Env, resume: Path | None, batch: BatchConfig | None = None) -> Inputs:
    """Open and check everything that a run reads.

    Args:
        resume: checkpoint that the run resumes from; None begins at step 0.
        batch: batch settings with a number for batch.micro=auto; None: those of the config.

    Raises:
        ValueError: a user's mistake, in one sentence.
        OSError: a file cannot be read.
    """
    batch = batch or config.batch
    batch.split(env.world, config.data.buckets)
    folder = RunFolder(Path(config.run.dir))
    initial_config = folder.initial_config()
    contents = compute_contents(config, initial_config)
    folder.check_config_matches(config.as_dict() | {"contents": contents})
    if resume is None and initial_config is not None:
        # Without a checkpoint the run begins again: fingerprint the weights that it reads now.
        contents = compute_contents(config, None)
    progress = Progress.read(resume / "state.json") if resume else None

    loader = _loader(config, env, batch, progress.cursor if progress else None)
    check_shared_memory(config.data, loader.split.micro, env.local_world)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if supports_bf16(env.device) else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    frozen = frozen_folder(config.frozen.path)
    autoencoder = Autoencoder.load(frozen, env.device, dtype, chunk=config.frozen.chunk)
    preview_clips = _preview_clips(config, env, loader)
    fixed_set = _fixed_set(config, env, loader, autoencoder)
    conditioner = None
    if config.task == "unet":
        seen = [part.clips for part in (preview_clips, fixed_set) if part is not None]
        contexts = [clips.context_BLD for clips in seen if clips.context_BLD is not None]
        if loader.context is not None and len(contexts) == len(seen):
            conditioner = Conditioner(config.conditioning, cached_width=contexts[0].shape[-1])
        else:
            conditioner = Conditioner.load(config.conditioning, frozen, env.device, dtype)
    weights = None if resume else _initial_weights(config)
    check_config_fits(config, loader, autoencoder, conditioner)
    return Inputs(
        folder=folder,
        contents=contents,
        checkpoints=open_checkpoints(config, env),
        resume=resume,
        progress=progress or Progress(loader.cursor),
        loader=loader,
        preview_clips=preview_clips,
        fixed_set=fixed_set,
        autoencoder=autoencoder,
        conditioner=conditioner,
        precision=precision,
        weights=weights,
    )


def _initial_weights(config: RunConfig) -> Iterator[tuple[str, Tensor]] | None:
    """Open the weights at init.from; return None if it is null.

    Raises:
        ValueError: the network of this stage cannot start from them.
    """
    if config.init.source is None:
        if config.task == "unet":
            check_trainable(config, dict.fromkeys(TAGS, "begin at random, because init.from is null"))
        return None
    path = Path(config.init.source)
    source = open_weights(path, config.init.which)
    new = source.check(config.model)
    check_scalar_order(config, path, source.config.num_scalars)
    network = network_parameters(config.model, source.lora)
    at_random = f"begin at random, because {path} lacks {len(new)} of their tensors"
    check_trainable(config, {network[name].tag: at_random for name in new})
    if (theirs := source.config.in_channels) < (ours := config.model.in_channels):
        channels = f"{path} has {theirs} input channels and model.in_channels is {ours}"
        check_trainable(config, {"spatial": f"ignore the new channels, because {channels}"})
    return source.tensors(config.model, merge=True)


def _loader(config: RunConfig, env: Env, batch: BatchConfig, cursor: Cursor | None) -> Loader:
    return Loader(
        config.data,
        seed=config.run.seed,
        rank=env.rank,
        world=env.world,
        batch=batch,
        cursor=cursor,
        context=config.conditioning.context if config.data.latents else None,
        read_last_frame=config.conditioning.uses_last_frame,
    )


def _fixed_loader(
    data: DataConfig, main_loader: Loader, seed: int, count: int, rank: int = 0, world: int = 1
) -> Loader:
    """Return a loader whose first batch is this rank's share of the first `count` clips, as uncropped pixels.

    The clips are the same in every restart of the run.

    Args:
        main_loader: loader of the run; cached CLIP embeddings are read if it reads them.
    """
    centred = replace(
        data, crop="center", flip=False, image_share=0.0, latents=False, buckets={}, num_workers=0
    )
    return Loader(centred, seed, rank, world, BatchConfig(count), context=main_loader.context)


def _preview_clips(config: RunConfig, env: Env, main_loader: Loader) -> PreviewClips:
    loader = _fixed_loader(config.data, main_loader, config.run.seed, config.sampling.num_videos)
    clips, _ = next(iter(loader))
    return PreviewClips.divide(clips, env.rank, env.world)


def _fixed_set(config: RunConfig, env: Env, main_loader: Loader, autoencoder: Autoencoder) -> FixedSet | None:
    """Read the clips of the evaluation. They are the same for all runs of an ablation, even if the runs
    differ in data.where or data.caption_weights."""
    if config.evaluation.every == 0 or config.task != "unet":
        return None
    data = replace(config.data, where=(), caption_weights={})
    if config.evaluation.path is not None:
        data = replace(data, path=config.evaluation.path, mixture={})
    per_rank = -(-config.evaluation.clips // env.world)
    loader = _fixed_loader(data, main_loader, SEED, per_rank * env.world, env.rank, env.world)
    check_sample_scalars(config, loader)
    clips, _ = next(iter(loader))
    read = (data.num_frames, data.height, data.width, data.fps)
    return FixedSet(f"{loader.fingerprint} {read} {autoencoder.fingerprint()}", clips)
