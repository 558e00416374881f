"""The loader, told in five steps. This is the only module that imports webdataset.

1. order.py says which positions of the run's global order this rank reads, and which samples stand there.
2. The micro-batches of those positions are dealt to the worker processes in turn, and collected in turn, so
   their number changes nothing but the speed.
3. A worker reads a sample's bytes by the range that the index gives, decodes and crops them (clips.py), and
   draws what is random about that from (seed, ordinal). From a latent cache (latents.py) it reads the clip's
   moments and decodes its first frame alone; the draws are the same.
4. Clips are stacked to a `Batch`.
5. The main process pairs each batch with the cursor behind its global step. A run that is given that cursor
   goes on with the next step, at any number of ranks and workers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import webdataset
from torch import Tensor
from torch.utils.data import get_worker_info

from svd_ds.batch import Batch, Clip
from svd_ds.data import latents, workers
from svd_ds.data.clips import ClipDraws, Timing, choose_caption, fills, read_frames
from svd_ds.data.cursor import Cursor
from svd_ds.data.filters import Condition, satisfies
from svd_ds.data.order import rank_positions, samples_at, step_end
from svd_ds.data.shards import Index, Sample

CROPS = ("random", "center")


@dataclass(frozen=True)
class DataConfig:
    """Which clips a run sees, and how they are read."""

    path: str = "data/shards"
    """Folder of shards with their index, as tools/make_shards.py writes it."""
    num_frames: int = 14
    """Frames a clip, T. Samples with fewer are left out; 1 trains on images (and single frames of videos)."""
    height: int = 320
    """Pixels. Samples that would have to be enlarged are left out."""
    width: int = 576
    """Pixels."""
    fps: float = 6.0
    """Wanted frames a second, met as near as a whole stride comes; 0 takes every stored frame."""
    crop: str = "random"
    """Where the window of the wanted aspect lies: "random" or "center"."""
    flip: bool = False
    """Mirror half of the clips. Leave off where captions name left and right."""
    where: tuple[str, ...] = ()
    """Conditions that a sample must meet, on its index line alone: "motion>=q25", "text_area<=0.07"."""
    image_share: float = 0.0
    """Share of the videos' clips that are a still image instead: one frame, repeated, which takes the image
    path. Above 0 the data set's own images are admitted as well, and always are stills."""
    latents: bool = False
    """Read the latents that tools/encode.py cached, and decode only first frames. Centred, never mirrored."""
    caption_weights: dict[str, float] = field(default_factory=dict)
    """Captioner's name -> weight with which its caption is drawn; empty: all alike."""
    num_workers: int = 2
    """Processes that decode, for each rank; 0 decodes in the training process."""
    prefetch: int = 2
    """Micro-batches that each worker holds ready."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, not {getattr(self, name)}")
        if self.num_workers < 0 or self.fps < 0:
            raise ValueError(f"data.num_workers={self.num_workers} or data.fps={self.fps} is negative")
        if not 0 <= self.image_share <= 1:
            raise ValueError(f"data.image_share is {self.image_share}, but must lie between 0 and 1")
        for condition in self.where:
            Condition.parse(condition)
        if self.crop not in CROPS:
            raise ValueError(f"data.crop={self.crop!r} is none of {', '.join(CROPS)}")
        if self.latents and (self.crop != "center" or self.flip):
            raise ValueError(
                "data.latents=true needs data.crop=center and data.flip=false, as latents are made, but they "
                f"are {self.crop} and {str(self.flip).lower()}"
            )
        weights = self.caption_weights.values()
        if weights and (min(weights) < 0 or sum(weights) == 0):
            raise ValueError(f"data.caption_weights={self.caption_weights} are negative or all zero")


class Loader:
    """The endless (micro-batch, cursor behind the global step that it belongs to) of one rank."""

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        rank: int,
        world: int,
        global_batch: int,
        micro_batch: int,
        cursor: Cursor | None = None,
    ) -> None:
        """
        Args:
            global_batch: clips a global step over all ranks: world x micro_batch x accumulation.
            cursor: where an earlier run stopped; None begins.

        Raises ValueError or FileNotFoundError for batches that do not divide, shards that are missing or
        truncated, data without a clip that is long and large enough, latents that are missing or of another
        size, a cursor that belongs to other data.
        """
        assert 0 <= rank < world, f"rank {rank} of {world}"
        if micro_batch < 1 or global_batch < 1 or global_batch % (world * micro_batch):
            raise ValueError(
                f"a global batch of {global_batch} clips is not a multiple of {world} ranks x {micro_batch} "
                f"clips a micro-batch = {world * micro_batch}"
            )
        self.config, self.seed, self.rank, self.world = config, seed, rank, world
        self.global_batch, self.micro_batch = global_batch, micro_batch
        everything = Index.load(config.path)
        chosen = everything.keep(satisfies(config.where, everything)) if config.where else everything
        if not len(chosen):
            raise ValueError(
                f"none of the {len(everything)} samples in {config.path} meets data.where="
                f"[{', '.join(config.where)}]"
            )
        self.index = chosen.keep(partial(_usable, config))
        self.num_left_out = len(everything) - len(self.index)
        if not len(self.index):
            raise ValueError(
                f"none of the {len(chosen)} samples in {config.path} has {config.num_frames} frames that "
                f"fill {config.height} x {config.width} pixels: {_largest(chosen)}"
            )
        self.origin = _origin(self.index, config) if config.latents else None
        self.cursor = cursor or Cursor(0, self.index.fingerprint)
        self.cursor.check(self.index.fingerprint, config.path)

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self.index)

    def __iter__(self) -> Iterator[tuple[Batch, Cursor]]:
        """Raises ValueError, naming shard and sample, for one that cannot be read."""
        start = self.cursor.position
        for batch in self._batches():
            if isinstance(batch, _Failure):
                raise ValueError(batch.sentence)
            after = step_end(start, batch.ordinals[0], self.global_batch)
            yield batch, Cursor(after, self.cursor.fingerprint)

    def _batches(self) -> Iterator[Batch | _Failure]:
        pipeline = webdataset.DataPipeline(
            self._places,
            webdataset.map(partial(_read_clip, self.index, self.config, self.origin, self.seed)),
            webdataset.batched(self.micro_batch, collation_fn=Batch.of, partial=False),
            _failures_as_values,
        )
        if self.config.num_workers == 0:
            return iter(pipeline)
        return workers.start(pipeline, self.config.num_workers, self.config.prefetch, __name__)

    def _places(self) -> Iterator[tuple[int, Sample]]:
        """(ordinal, sample) for each clip of this rank that falls to this worker process."""
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        positions = rank_positions(
            self.cursor.position, self.rank, self.world, self.micro_batch, number, num_workers
        )
        for ordinal, sample in samples_at(self.index.shard_sizes, self.seed, positions):
            yield ordinal, self.index.sample(sample)


@dataclass(frozen=True)
class _Failure:
    """A worker's error as a value: torch would wrap the exception in the text of a traceback."""

    sentence: str


def _failures_as_values(batches: Iterable[Batch]) -> Iterator[Batch | _Failure]:
    try:
        yield from batches
    except (ValueError, OSError) as error:
        yield _Failure(str(error))


def _origin(index: Index, config: DataConfig) -> latents.Origin:
    """What the latents were made of. Raises ValueError where a sample has none, or those of another size."""
    for sample in index.samples():
        if latents.MEMBER not in sample.members:
            raise ValueError(f"sample {sample.id} in {config.path} has no latents; tools/encode.py adds them")
    first = index.sample(0)
    try:
        origin = latents.read_origin(index.read(first, latents.MEMBER))
    except ValueError as error:
        raise ValueError(f"sample {first.id} in {config.path} cannot be read: {error}") from error
    if (origin.height, origin.width) != (config.height, config.width):
        raise ValueError(
            f"the latents in {config.path} are of {origin.height} x {origin.width} pixels, and data.height x "
            f"data.width is {config.height} x {config.width}; tools/encode.py --size makes others"
        )
    return origin


def _read_clip(
    index: Index, config: DataConfig, origin: latents.Origin | None, seed: int, place: tuple[int, Sample]
) -> Clip:
    """Read, decode and crop one sample. Raises ValueError, naming shard and sample, if it cannot be read."""
    ordinal, sample = place
    draws = ClipDraws.of(seed, ordinal)
    still = config.num_frames > 1 and (sample.num_frames == 1 or draws.still < config.image_share)
    num_frames = 1 if still else config.num_frames
    timing = Timing.of(sample.num_frames, sample.fps, num_frames, config.fps, draws.start)
    wanted = timing.frames(num_frames)
    top, left = (draws.top, draws.left) if config.crop == "random" else (0.5, 0.5)
    mirrored = config.flip and draws.flip < 0.5
    moments = None
    try:
        about = json.loads(index.read(sample, "json"))
        caption = choose_caption(about["captions"], config.caption_weights, draws.caption)
        if origin is not None:
            moments = _read_moments(index.read(sample, latents.MEMBER), wanted, origin)
            wanted = wanted[:1]
        media = index.read(sample, sample.media)
        frames = read_frames(media, wanted, (config.height, config.width), top, left, mirrored)
    except ValueError as error:
        shard = index.folder / index.shards[sample.shard].name
        raise ValueError(f"sample {sample.id} of {shard} cannot be read: {error}") from error
    if still:
        # Each of the T frames gets noise of its own: T lessons of one image, in the shape of a clip.
        if moments is None:
            frames = frames.expand(config.num_frames, -1, -1, -1)
        else:
            moments = moments.expand(config.num_frames, -1, -1, -1)
    return Clip(
        id=sample.id,
        ordinal=ordinal,
        frames_TCHW=frames,
        caption=caption,
        fps=timing.fps,
        motion_bucket=index.motion_map.bucket(0.0 if still else sample.motion),
        elevation=math.nan if sample.elevation is None else sample.elevation,
        moments_TMhw=moments,
        still=still,
    )


def _read_moments(content: bytes, wanted: range, origin: latents.Origin) -> Tensor:
    if (other := latents.read_origin(content)) != origin:
        raise ValueError(f"its latents are {other}, where the first sample's are {origin}")
    return latents.unpack(content, wanted)


def _usable(config: DataConfig, sample: Sample) -> bool:
    """Is the sample long enough, or a wanted image, and large enough to be reduced rather than enlarged?"""
    large = fills((sample.height, sample.width), (config.height, config.width))
    long = sample.num_frames >= config.num_frames or (sample.num_frames == 1 and config.image_share > 0)
    return large and long


def _largest(index: Index) -> str:
    samples = list(index.samples())
    num_frames = max((sample.num_frames for sample in samples), default=0)
    height, width = max(((sample.height, sample.width) for sample in samples), default=(0, 0))
    return f"the longest has {num_frames} frames, the largest is {height} x {width}"
