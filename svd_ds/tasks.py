"""Tasks: everything that differs between training the UNet and training the autoencoder's decoder.

Each task is one function, from the config and the inputs of a run to a Task. The rest of the trainer does not
depend on the task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from svd_ds.config import RunConfig
from svd_ds.diffusion.noise import build_noise_schedule
from svd_ds.inputs import Inputs
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.decoder import Decoder, DecoderConfig, build_decoder
from svd_ds.model.layers import choose_kernels
from svd_ds.model.lora import add_lora, is_adapter
from svd_ds.model.ops.trial import KernelChoice, KernelSettings, choose, run_trials
from svd_ds.model.perceptual import Perceptual
from svd_ds.model.unet import UNet
from svd_ds.parallel.collectives import all_gather_objects, raise_on_all_ranks
from svd_ds.parallel.env import Env, host
from svd_ds.parallel.triton_cache import use_local_cache
from svd_ds.sample import frozen_folder
from svd_ds.training.checkpoint_files import NetworkSettings
from svd_ds.training.objectives.base import Objective
from svd_ds.training.objectives.decoder import DecoderObjective, ReconstructionPreview, psnr
from svd_ds.training.objectives.diffusion import DiffusionObjective
from svd_ds.training.objectives.discriminator import DiscriminatorTrainer
from svd_ds.training.preview import PreviewFn, PreviewMetrics, SamplingPreview


@dataclass(frozen=True)
class Task:
    """Network that a run trains, and its objective and previews."""

    build: Callable[[], UNet | Decoder]
    """Builds the network, with its adapters."""
    init_sharded: bool
    """True if the network can be built inside DeepSpeed's zero.Init. If False, each rank builds all of it
    before it is sharded."""
    is_trainable: Callable[[str], bool]
    """Returns False for the name of a parameter that is frozen in any case, independently of its tag."""
    weights: Iterator[tuple[str, Tensor]] | None
    """Initial weights by name; None if they are random, or come from the checkpoint."""
    settings: NetworkSettings
    """Files in a checkpoint that describe the network: name -> content."""
    objective: Objective
    preview_fn: PreviewFn
    """Renders the previews."""
    preview_metrics: PreviewMetrics
    """Metrics of the previews against the real clips."""
    notes: tuple[str, ...] = ()
    """Notes for the user, printed at the start."""


def choose_kernels_on_all_ranks(config: RunConfig, env: Env, precision: str) -> KernelChoice:
    """Try the kernels of the UNet, and choose those that work on every rank. All ranks call it.

    The choice is the same on all ranks: ranks with different kernels would round differently.

    Args:
        precision: bf16 or fp32.

    Raises:
        SharedError: on all ranks; a kernel that is chosen by name cannot be used on one of them.
    """
    if config.task != "unet":
        return KernelChoice()
    if env.device.type == "cuda":
        use_local_cache()
    settings = KernelSettings.read(config.model)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    reports = all_gather_objects([(host(), run_trials(settings, env.device, dtype))])
    return raise_on_all_ranks(lambda: choose(settings, reports))


def read_task(config: RunConfig, env: Env, inputs: Inputs, kernels: KernelChoice | None = None) -> Task:
    """Build the task of a run.

    Args:
        kernels: result of `choose_kernels_on_all_ranks`; None keeps those of the config, untried.

    Raises:
        ValueError: a file of weights does not fit the task.
        OSError: a file of weights cannot be read.
    """
    return _unet(config, inputs, kernels) if config.task == "unet" else _decoder(config, env, inputs)


def _unet(config: RunConfig, inputs: Inputs, kernels: KernelChoice | None) -> Task:
    """Build the diffusion task (arXiv 2311.15127 section D): the UNet, or LoRA adapters on it."""
    assert inputs.conditioner is not None, "a UNet has a conditioner"

    def build() -> UNet:
        unet = UNet(config.model)
        if kernels is not None:
            choose_kernels(unet, kernels.kernels, kernels.attention)
        add_lora(unet, config.lora)
        return unet

    adapters = {"lora.json": asdict(config.lora)} if config.lora.rank else {}
    return Task(
        build=build,
        init_sharded=True,
        is_trainable=is_adapter if config.lora.rank else lambda name: True,
        weights=inputs.weights,
        settings={"config.json": asdict(config.model), **adapters},
        objective=DiffusionObjective(
            noise=build_noise_schedule(config.noise, config.data.height, config.data.width),
            offset_noise=config.noise.offset_noise,
            autoencoder=inputs.autoencoder,
            conditioner=inputs.conditioner,
            seed=config.run.seed,
        ),
        preview_fn=SamplingPreview(config.sampling, inputs.autoencoder, inputs.conditioner),
        preview_metrics={},
        notes=kernels.notes if kernels is not None else (),
    )


def _decoder(config: RunConfig, env: Env, inputs: Inputs) -> Task:
    """Build the task of the autoencoder's decoder, with VideoLDM's recipe (arXiv 2304.08818 section
    3.1.1)."""
    loss, notes, weights = config.loss, [], None
    shape = DecoderConfig.from_autoencoder(inputs.autoencoder.network)
    if inputs.resume is None:
        # A second copy in float32: inputs.autoencoder is in the compute precision.
        network = Autoencoder.load(frozen_folder(config.frozen.path)).network
        decoder, new = build_decoder(network, config.run.seed)
        weights = ((name, parameter.detach()) for name, parameter in decoder.named_parameters())
        if new:
            notes.append(
                f"the autoencoder in {config.frozen.path} is an image model: the {len(new)} tensors of its "
                f"decoder's temporal layers are initialised as the identity: {new[0]}, ..."
            )
    perceptual = None
    if loss.perceptual is not None:
        perceptual = Perceptual.load(loss.perceptual, loss.perceptual_heads).to(env.device)
    else:
        notes.append("loss.perceptual is null: the loss has no perceptual term")
    discriminator = None
    if loss.adversarial_weight:
        discriminator = DiscriminatorTrainer(
            loss.discriminator_width, loss.discriminator_lr, config.run.seed, env.device
        )
    return Task(
        build=lambda: Decoder(shape),
        # diffusers' AlphaBlender calls torch.Tensor([value]), which inside zero.Init is read as a size.
        init_sharded=False,
        is_trainable=lambda name: True,
        weights=weights,
        settings={"config.json": asdict(shape)},
        objective=DecoderObjective(loss, inputs.autoencoder, perceptual, discriminator, config.run.seed),
        preview_fn=ReconstructionPreview(inputs.autoencoder),
        preview_metrics={"psnr": psnr},
        notes=tuple(notes),
    )
