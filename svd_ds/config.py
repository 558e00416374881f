"""Configuration of a run: one dataclass, composed of those of the components, and checks across sections."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from svd_ds.data.batching import BatchConfig
from svd_ds.data.config import DataConfig
from svd_ds.diffusion.noise import NoiseConfig
from svd_ds.jobs.watchdog import WatchdogConfig
from svd_ds.model.conditioner import ConditionerConfig
from svd_ds.model.lora import LoraConfig
from svd_ds.model.unet import UNetConfig
from svd_ds.parallel.recompute import POLICIES
from svd_ds.parallel.zero import PRECISIONS, ZeroConfig
from svd_ds.settings import INT64_MAX, Settings, choice, location, number, text
from svd_ds.training.ema import EMAConfig
from svd_ds.training.evaluate import EvaluationConfig
from svd_ds.training.guard import GuardConfig
from svd_ds.training.metrics import LoggerConfig
from svd_ds.training.objectives.decoder import DecoderLossConfig
from svd_ds.training.optim import OptimConfig
from svd_ds.training.preview import PreviewConfig
from svd_ds.training.retention import CheckpointConfig
from svd_ds.weights.shards import NETWORKS

FIELD_ALIASES = {"source": "from"}  # InitConfig repeats the key, for its error messages
"""Field of InitConfig -> its key in config files, where the key is a keyword of Python."""


@dataclass(frozen=True)
class RunSection(Settings, section="run"):
    """Folder, length and seed of a run."""

    dir: str = location("runs/small")
    """Run folder. The same command with the same folder resumes the run."""
    steps: int = number(400, ge=1, le=10**9)
    """Optimiser steps of the run, over all restarts."""
    seed: int = number(0, ge=0, le=INT64_MAX)
    """Seed of the weights that are initialised at random, of the data order, and of all random numbers of a
    clip."""
    resume: str = location("auto")
    """Checkpoint to resume from: auto (the newest in run.dir, if there is one) | never (a run folder that has
    checkpoints is refused) | PATH of a checkpoint."""


@dataclass(frozen=True)
class FrozenConfig(Settings, section="frozen"):
    """Frozen models: the autoencoder and the encoders of images and text."""

    path: str = location("tiny")
    """Folder in the layout of the public SVD pipeline (vae/, image_encoder/, ...), or the id of one on the
    Hugging Face hub; tiny: the shipped tiny models."""
    chunk: int = number(14, ge=1, le=10_000)
    """Number of frames that the autoencoder encodes or decodes at once; fewer take less memory."""


@dataclass(frozen=True)
class InitConfig(Settings, section="init"):
    """Initial weights of the network."""

    source: str | None = location(None, key="from")
    """Run folder or checkpoint of the previous stage, diffusers folder, or single .safetensors file in the
    original layout; null initialises all weights at random."""
    which: str | None = text(None)
    """Weights of the run or checkpoint in init.from: raw, or the name of an average such as power-0.050; null
    takes the first average."""


@dataclass(frozen=True)
class RunConfig(Settings):
    """All settings of a run."""

    name: str = text("small")
    """Run name; the default folder is runs/NAME."""
    task: str = choice("unet", NETWORKS)
    """Network that is trained: unet | decoder (the autoencoder's decoder, with its temporal layers)."""
    run: RunSection = field(default_factory=RunSection)
    model: UNetConfig = field(default_factory=UNetConfig)
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
    conditioning: ConditionerConfig = field(default_factory=ConditionerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    loss: DecoderLossConfig = field(default_factory=DecoderLossConfig)
    """Loss of the decoder; the loss of the UNet is the squared error of v."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    init: InitConfig = field(default_factory=InitConfig)
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=0))
    """Low-rank adapters; if there are any, only they are trained."""
    parallel: ZeroConfig = field(default_factory=ZeroConfig)
    precision: str = choice("auto", ("auto", *PRECISIONS))
    """Compute precision: auto (bf16 if the processor supports it, else fp32) | bf16 | fp32."""
    recompute: str = choice("blocks", POLICIES)
    """Activation checkpointing: none | blocks (every residual block and every transformer) | attention (like
    blocks, but the outputs of attention are kept) | full (a residual block and its transformer together)."""
    deterministic: bool = False
    """Use only kernels that give the same bits in every run (docs/numerics.md). It matters on GPUs alone,
    where some of them are slower."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sampling: PreviewConfig = field(default_factory=PreviewConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora.rank and self.init.source is None:
            raise ValueError(
                f"lora.rank is {self.lora.rank} and init.from is null: adapters need trained weights"
            )

        if self.task == "decoder":
            self._check_decoder()

    def _check_decoder(self) -> None:
        if self.init.source is not None:
            raise ValueError(
                f"init.from is {self.init.source} and task is decoder: it must be null, because a decoder "
                "starts from the vae/ in frozen.path"
            )
        if self.data.latents:
            raise ValueError("data.latents is true and task is decoder: a decoder is trained on frames")
        if self.optim.spatial_lr_scale == self.optim.temporal_lr_scale == 0:
            raise ValueError(
                "optim.spatial_lr_scale and optim.temporal_lr_scale are both 0: a decoder has no other layers"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, as in config.yaml."""
        settings = dataclasses.asdict(self)
        settings["init"] = {FIELD_ALIASES.get(name, name): value for name, value in settings["init"].items()}
        return _plain(settings)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(branch) for key, branch in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(branch) for branch in value]
    return value
