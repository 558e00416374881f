"""Preview videos during training, sampled with the averaged weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svd_ds.batch import Batch
from svd_ds.fsync_io import name_errors, replace_text
from svd_ds.model.autoencoder import Autoencoder
from svd_ds.model.conditioner import Conditioner
from svd_ds.parallel.collectives import gather_rows_to_rank0, raise_on_all_ranks
from svd_ds.parallel.engine import Engine
from svd_ds.parallel.env import Env
from svd_ds.run_folder import RunFolder
from svd_ds.sample import SampleConfig, sample_video
from svd_ds.settings import number
from svd_ds.training.ema import ShardEMA
from svd_ds.video import contact_sheet, from_uint8, to_uint8, write_mp4


@dataclass(frozen=True)
class PreviewConfig(SampleConfig):
    """Preview videos during training, and the sampler that makes them."""

    every: int = number(1000, ge=1)
    """Steps between previews; the last step always has one."""
    num_videos: int = number(4, ge=1, le=10_000)
    """Number of preview videos. Each is sampled from the conditions of a fixed training clip: its first
    frame, last frame or caption, as the network needs them."""


PreviewFn = Callable[[Callable[..., Tensor], Batch, Sequence[int]], Tensor]
"""(network, clips, ordinals that seed the noise) -> frames in [-1, 1], (B, T, 3, H, W)."""
PreviewMetrics = Mapping[str, Callable[[Tensor, Tensor], float]]
"""Metric name -> function of generated and real videos, both uint8 (B, T, 3, H, W)."""


@dataclass(frozen=True)
class PreviewClips:
    """One rank's part of the clips whose previews are rendered, the same clips each time."""

    clips: Batch
    """Clips that this rank renders, the same number on every rank: all must run the sharded network equally
    often. The last ranks may have copies of the last clip, which are not shown."""
    indices: tuple[int, ...]
    """Index of each of `clips` among all clips; it seeds the noise."""
    counts: tuple[int, ...]
    """Number of clips of each rank that are shown."""
    real_BTCHW: Tensor | None
    """Frames of all clips, which are shown next to their previews; None on ranks above 0."""

    @staticmethod
    def divide(clips: Batch, rank: int, world: int) -> PreviewClips:
        """Return the part of `rank` of all clips."""
        per_rank = -(-len(clips) // world)
        indices = tuple(min(rank * per_rank + i, len(clips) - 1) for i in range(per_rank))
        counts = tuple(min(max(len(clips) - per_rank * other, 0), per_rank) for other in range(world))
        real_BTCHW = clips.frames_BTCHW if rank == 0 else None
        return PreviewClips(clips.select(indices), indices, counts, real_BTCHW)


@dataclass(frozen=True)
class Preview:
    """Files of the previews of one step, and their metrics against the real clips."""

    videos: list[Path]
    sheet: Path
    """Contact sheet (png)."""
    metrics: dict[str, float]


@dataclass(frozen=True)
class SamplingPreview:
    """PreviewFn that samples clips from their first frames, both ends, or captions."""

    config: PreviewConfig
    autoencoder: Autoencoder
    conditioner: Conditioner

    def __call__(self, net: Callable[..., Tensor], clips: Batch, ordinals: Sequence[int]) -> Tensor:
        frames_BTCHW = from_uint8(clips.frames_BTCHW)
        return sample_video(
            net,
            self.autoencoder,
            self.conditioner,
            first_frame=frames_BTCHW[:, 0],
            last_frame=frames_BTCHW[:, -1],
            num_frames=clips.num_frames,
            config=self.config,
            captions=clips.captions,
            ordinals=ordinals,
            context=clips.context_BLD,
        )


@dataclass(frozen=True)
class Previews:
    """Renders previews of the same clips each time; the clips are divided over the ranks."""

    clips: PreviewClips
    preview_fn: PreviewFn
    metrics: PreviewMetrics
    fps: float
    """Frame rate of the video files."""
    folder: RunFolder
    env: Env
    check_not_fenced: Callable[[], None] = lambda: None
    """Raises ValueError if another restart has acquired the run folder."""

    def make(self, step: int, engine: Engine, ema: ShardEMA) -> Preview | None:
        """Render with the first average of the weights and write `samples/step-N/`. All ranks call it.

        The folder has video-0.mp4, video-1.mp4, ...; contact_sheet.png, with each video below its real clip;
        and measures.json with the metrics, if there are any.

        Returns:
            The preview on rank 0, None on the others.
        """
        clips = self.clips.clips.to(self.env.device)
        with torch.no_grad(), engine.weights(ema.shards(ema.config.names[0])):
            frames_BTCHW = self.preview_fn(engine, clips, self.clips.indices)
        # A copy of a clip that is not shown leaves neither the device nor the rank.
        shown_BTCHW = to_uint8(frames_BTCHW[: self.clips.counts[self.env.rank]])
        videos_BTCHW = gather_rows_to_rank0(shown_BTCHW, self.clips.counts)
        return raise_on_all_ranks(lambda: None if videos_BTCHW is None else self._write(step, videos_BTCHW))

    def _write(self, step: int, videos_BTCHW: Tensor) -> Preview:
        self.check_not_fenced()
        folder, real_BTCHW = self.folder.samples(step), self.clips.real_BTCHW
        assert real_BTCHW is not None, "rank 0 writes"
        paths = [folder / f"video-{i}.mp4" for i in range(len(videos_BTCHW))]
        sheet = folder / "contact_sheet.png"
        with name_errors(folder):
            for path, frames_TCHW in zip(paths, videos_BTCHW, strict=True):
                write_mp4(frames_TCHW, path, self.fps)
            contact_sheet([row for pair in zip(real_BTCHW, videos_BTCHW, strict=True) for row in pair], sheet)
        metrics = {name: metric(videos_BTCHW, real_BTCHW) for name, metric in self.metrics.items()}
        if metrics:
            replace_text(folder / "measures.json", json.dumps(metrics, indent=1) + "\n")
        return Preview(paths, sheet, metrics)
