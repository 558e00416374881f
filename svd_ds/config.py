"""The whole of a run's settings: one dataclass, composed of the parts' own, with the checks across them."""

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

FIELD_ALIASES = {"source": "from"}  # InitConfig declares the key as well, for its errors
"""What users write for a field of InitConfig that cannot have the name: Python keeps the word for itself."""


@dataclass(frozen=True)
class RunSection(Settings, section="run"):
    dir: str = location("runs/small")
    """The run's folder; starting again with the same folder resumes."""
    steps: int = number(400, ge=1, le=10**9)
    """Optimiser steps in all, over every life of the run."""
    seed: int = number(0, ge=0, le=INT64_MAX)
    resume: str = location("auto")
    """auto (the newest checkpoint of run.dir, if any) | never (refuse a folder with checkpoints) | PATH of
    one."""


@dataclass(frozen=True)
class FrozenConfig(Settings, section="frozen"):
    path: str = location("tiny")
    """Folder in the layout of the public SVD pipeline (vae/, image_encoder/, ...) or a hub id; tiny: the
    shipped set."""
    chunk: int = number(14, ge=1, le=10_000)
    """Frames that the autoencoder takes at once."""


@dataclass(frozen=True)
class InitConfig(Settings, section="init"):
    """Where the weights come from; null draws them at random."""

    source: str | None = location(None, key="from")
    """The run or checkpoint folder of the stage before, a diffusers folder, or an original single
    .safetensors. Users write it `init.from`."""
    which: str | None = text(None)
    """Of a run: raw, or the name of an average; null takes the first average."""


@dataclass(frozen=True)
class RunConfig(Settings):
    name: str = text("small")
    """Of the run; its folder is named after it."""
    task: str = choice("unet", NETWORKS)
    """What learns: unet | decoder (the autoencoder's decoder, with its layers of time)."""
    run: RunSection = field(default_factory=RunSection)
    model: UNetConfig = field(default_factory=UNetConfig)
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
    conditioning: ConditionerConfig = field(default_factory=ConditionerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    loss: DecoderLossConfig = field(default_factory=DecoderLossConfig)
    """Of the decoder; the UNet's is the squared error of v."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    init: InitConfig = field(default_factory=InitConfig)
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=0))
    """Low-rank adapters, which then learn alone."""
    parallel: ZeroConfig = field(default_factory=ZeroConfig)
    precision: str = choice("auto", ("auto", *PRECISIONS))
    """auto (bf16 where the processor computes in it, else fp32) | bf16 | fp32."""
    recompute: str = choice("blocks", POLICIES)
    """Activation checkpointing: none | blocks (every residual block and transformer) | attention (blocks, but
    what attention gave is kept) | full (a residual block and its transformer together)."""
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
                f"lora.rank is {self.lora.rank} and init.from null: adapters adapt trained weights"
            )

        if self.task == "decoder":
            self._check_decoder()

    def _check_decoder(self) -> None:
        if self.init.source is not None:
            raise ValueError(
                f"init.from is {self.init.source} and task decoder: it starts from frozen.path's vae/"
            )
        if self.data.latents:
            raise ValueError("data.latents is true and task decoder: it learns from frames")
        if self.optim.spatial_lr_scale == self.optim.temporal_lr_scale == 0:
            raise ValueError(
                "optim.spatial_lr_scale and optim.temporal_lr_scale are both 0: a decoder has no other layers"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, as config.yaml holds them."""
        settings = dataclasses.asdict(self)
        settings["init"] = {FIELD_ALIASES.get(name, name): value for name, value in settings["init"].items()}
        return _plain(settings)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(branch) for key, branch in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(branch) for branch in value]
    return value
