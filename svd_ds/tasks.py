"""What a run trains, and to what end: what differs between training the UNet and training the decoder.

Each task is one function here, from a run's config and inputs to a Task. The rest of the trainer knows none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from svd_ds.config import RunConfig
from svd_ds.diffusion.noise import build_noise
from svd_ds.inputs import Inputs
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.decoder import Decoder, DecoderConfig, build_decoder
from svd_ds.model.lora import add_lora, is_adapter
from svd_ds.model.ops.attention import check_backend
from svd_ds.model.ops.fused import check_kernels
from svd_ds.model.perceptual import Perceptual
from svd_ds.model.unet import UNet
from svd_ds.parallel.env import Env
from svd_ds.sample import frozen_folder
from svd_ds.training.checkpoint_files import Settings
from svd_ds.training.objectives.base import Objective
from svd_ds.training.objectives.decoder import DecoderObjective, ReconstructionPreview, psnr
from svd_ds.training.objectives.diffusion import DiffusionObjective
from svd_ds.training.objectives.discriminator import DiscriminatorTrainer
from svd_ds.training.preview import PreviewFn, PreviewMetrics, SamplingPreview


@dataclass(frozen=True)
class Task:
    """What a run trains."""

    build: Callable[[], UNet | Decoder]
    """Makes the network with all that is put on it."""
    init_sharded: bool
    """Whether it can be made in shards. If not, each rank makes all of it before it is cut up."""
    is_trainable: Callable[[str], bool]
    """Whether the parameter of a name may learn; its tag's rate decides further."""
    weights: Iterator[tuple[str, Tensor]] | None
    """To begin with; None leaves them to chance, or to the checkpoint."""
    settings: Settings
    """What a checkpoint says of the network."""
    objective: Objective
    preview_fn: PreviewFn
    """Makes the previews."""
    measures: PreviewMetrics
    """Of the previews."""
    notes: tuple[str, ...] = ()
    """What a person should know at the start."""


def read_task(config: RunConfig, env: Env, inputs: Inputs) -> Task:
    """The task of `config`. Raises ValueError or OSError with one sentence for files that it needs."""
    return _unet(config, env, inputs) if config.task == "unet" else _decoder(config, env, inputs)


def _unet(config: RunConfig, env: Env, inputs: Inputs) -> Task:
    """Diffusion (arXiv 2311.15127 section D): the UNet, or adapters on it."""
    assert inputs.conditioner is not None, "a UNet is conditioned"
    check_kernels(config.model.kernels, env.device)
    dtype = torch.bfloat16 if inputs.precision == "bf16" else torch.float32
    for backend in (config.model.spatial_attention, config.model.temporal_attention):
        check_backend(backend, env.device, dtype)

    def build() -> UNet:
        unet = UNet(config.model)
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
            noise=build_noise(config.noise, config.data.height, config.data.width),
            offset_noise=config.noise.offset_noise,
            autoencoder=inputs.autoencoder,
            conditioner=inputs.conditioner,
            seed=config.run.seed,
        ),
        preview_fn=SamplingPreview(config.sampling, inputs.autoencoder, inputs.conditioner),
        measures={},
    )


def _decoder(config: RunConfig, env: Env, inputs: Inputs) -> Task:
    """The autoencoder's decoder, as VideoLDM trained its own (arXiv 2304.08818 section 3.1.1)."""
    loss, notes, weights = config.loss, [], None
    shape = DecoderConfig.from_autoencoder(inputs.autoencoder.network)
    if inputs.resume is None:
        # A second copy: the encoder's is in the compute precision.
        whole = Autoencoder.load(frozen_folder(config.frozen.path)).network
        decoder, new = build_decoder(whole, config.run.seed)
        weights = ((name, parameter.detach()) for name, parameter in decoder.named_parameters())
        if new:
            notes.append(
                f"the autoencoder in {config.frozen.path} is an image model: the {len(new)} tensors of its "
                f"decoder's layers of time start afresh, and leave its frames as they are: {new[0]}, ..."
            )
    perceptual = None
    if loss.perceptual is not None:
        perceptual = Perceptual.load(loss.perceptual, loss.perceptual_heads).to(env.device)
    else:
        notes.append("loss.perceptual is null: the loss has no perceptual term")
    adversary = None
    if loss.adversarial_weight:
        adversary = DiscriminatorTrainer(
            loss.discriminator_width, loss.discriminator_lr, config.run.seed, env.device
        )
    return Task(
        build=lambda: Decoder(shape),
        # diffusers' AlphaBlender calls torch.Tensor([value]): inside DeepSpeed's zero.Init that is a size.
        init_sharded=False,
        is_trainable=lambda name: True,
        weights=weights,
        settings={"config.json": asdict(shape)},
        objective=DecoderObjective(loss, inputs.autoencoder, perceptual, adversary, config.run.seed),
        preview_fn=ReconstructionPreview(inputs.autoencoder),
        measures={"psnr": psnr},
        notes=tuple(notes),
    )
