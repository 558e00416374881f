"""Videos sampled during training, from the averaged weights, so that one sees what is being learned.

Each rank fills a UNet of its own from the average's shards, a parameter at a time, and samples its share of the
clips; ZeRO-3's partitions are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from svd_ds.batch import Batch
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.conditioner import Conditioner
from svd_ds.model.unet import UNet, UNetConfig
from svd_ds.parallel.engine import Engine
from svd_ds.parallel.env import Env
from svd_ds.sample import SampleConfig, sample_video
from svd_ds.training.ema import ShardEMA
from svd_ds.training.folder import RunFolder
from svd_ds.video import contact_sheet, write_mp4


@dataclass(frozen=True)
class PreviewConfig(SampleConfig):
    every: int = 1000
    """Steps between previews; the last step always leaves one."""
    num_videos: int = 4
    """Fixed clips whose first frames (and captions) are the conditions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1 or self.num_videos < 1:
            raise ValueError(
                f"sampling.every is {self.every} and sampling.num_videos {self.num_videos}: both must be at least 1"
            )
