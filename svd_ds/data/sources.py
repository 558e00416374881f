"""The data sets of a run, opened: which of their samples count, in which bucket, and what is cached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from svd_ds.data import clip_embeddings, latents
from svd_ds.data.cached_tensors import TensorFile
from svd_ds.data.clips import covers
from svd_ds.data.config import DataConfig, Shape
from svd_ds.data.filters import satisfies
from svd_ds.data.folders import INDEX_NAME, Folder
from svd_ds.data.motion import MotionMap
from svd_ds.data.quarantine import Fault, Quarantine
from svd_ds.data.read_timeout import with_timeout
from svd_ds.data.sample import Sample, Shard
from svd_ds.data.shards import Index


@dataclass(frozen=True)
class DatasetSource:
    """One data set of a run."""

    path: str
    weight: float
    """Share of the clips, in any unit."""
    buckets: tuple[Index, ...]
    """Its samples of each bucket."""
    num_left_out: int
    faults: tuple[Fault, ...]
    """The samples whose index lines are damaged; they are in no bucket."""
    notes: tuple[str, ...]
    """What a user should know of the samples that were left out."""
    latents_origin: latents.LatentsOrigin | None
    """None: every frame is decoded."""
    latents_shape: tuple[int, ...]
    """(M, h, w) of the moments; the first sample's, which those of all must have to make a batch."""
    embeddings_origin: clip_embeddings.EmbeddingsOrigin | None
    """None where a sample that counts has no CLIP clip_embeddings."""
    embeddings_shapes: dict[str, tuple[int, ...]]
    """Context -> shape of its clip_embeddings, as `clip_embeddings.moments_shape`; the first sample's."""

    @property
    def motion_map(self) -> MotionMap:
        return self.buckets[0].motion_map

    @property
    def files(self) -> tuple[Folder, tuple[Shard, ...]]:
        return self.buckets[0].folder, self.buckets[0].shards

    def __len__(self) -> int:
        return sum(map(len, self.buckets))


def open_dataset(path: str, weight: float, config: DataConfig, folder: Folder) -> DatasetSource:
    """Raises ValueError or OSError, in one sentence, where `folder` is no data set, has no sample to draw, or
    has not the latents that are to be read."""
    hung = f"reading {folder.name(INDEX_NAME)} has hung for data.read_timeout_seconds={config.read_timeout_seconds:g}"
    loaded = with_timeout(lambda: Index.load(folder), config.read_timeout_seconds, hung)
    everything, faults = loaded.drop_damaged(Quarantine(config.max_quarantined, len(loaded)))
    selection = satisfies(config.where, everything)
    chosen = everything.keep(selection) if config.where else everything
    if not len(chosen):
        raise ValueError(
            f"none of the {len(everything)} samples in {path} meets data.where=[{', '.join(config.where)}]"
        )
    shapes = config.shapes
    buckets = chosen.split(lambda sample: choose_bucket(sample, config, shapes), len(shapes))
    if not any(map(len, buckets)):
        raise ValueError(
            f"none of the {len(chosen)} samples in {path} has {_wanted(shapes)}: {_largest(chosen)}"
        )
    origin, latents_shape = _latents_of(path, buckets, shapes) if config.latents else (None, ())
    embeddings_origin, embeddings_shapes = _embeddings_of(buckets, config)
    return DatasetSource(
        path=path,
        weight=weight,
        buckets=tuple(buckets),
        num_left_out=len(everything) - sum(map(len, buckets)),
        faults=tuple(faults),
        notes=selection.notes,
        latents_origin=origin,
        latents_shape=latents_shape,
        embeddings_origin=embeddings_origin,
        embeddings_shapes=embeddings_shapes,
    )


def choose_bucket(sample: Sample, config: DataConfig, shapes: Sequence[Shape]) -> int | None:
    """The bucket that a sample belongs to: of those for which it is long enough, and large enough to be
    reduced rather than enlarged, the nearest in aspect, then the longest, then the largest.

    A video goes to a bucket of stills only where no other takes it. None where none does.
    """
    best: tuple[tuple[bool, float, int, int], int] | None = None
    for number, shape in enumerate(shapes):
        long = sample.num_frames >= shape.num_frames or (sample.num_frames == 1 and config.image_share > 0)
        if not long or not covers((sample.height, sample.width), (shape.height, shape.width)):
            continue
        stretch = math.log(sample.height * shape.width / (sample.width * shape.height))
        # Rounded: shapes of one aspect differ by some pixels, as sides are multiples.
        rank = (
            shape.num_frames > 1,
            -round(abs(stretch), 1),
            shape.num_frames,
            shape.height * shape.width,
        )
        if best is None or rank > best[0]:
            best = (rank, number)
    return None if best is None else best[1]


def _latents_of(
    path: str, buckets: Sequence[Index], shapes: Sequence[Shape]
) -> tuple[latents.LatentsOrigin, tuple[int, ...]]:
    """What the latents were made of, and their shape. Raises ValueError where a sample has none, or those of
    another size."""
    for index in buckets:
        for sample in index.samples():
            if latents.MEMBER not in sample.members:
                raise ValueError(f"sample {sample.id} in {path} has no latents; tools/encode.py adds them")
    index = next(index for index in buckets if len(index))
    first = index.sample(0)
    try:
        with index.open(first) as read:
            file = TensorFile(partial(read, latents.MEMBER), latents.MEMBER)
            origin, shape_Mhw = latents.read_origin(file), latents.moments_shape(file)
    except ValueError as error:
        raise ValueError(f"sample {first.id} in {path} cannot be read: {error}") from error
    for index, shape in zip(buckets, shapes, strict=True):
        if len(index) and (origin.height, origin.width) != (shape.height, shape.width):
            raise ValueError(
                f"the latents in {path} are of {origin.height} x {origin.width} pixels, and data.height x "
                f"data.width is {shape.height} x {shape.width}; tools/encode.py --size makes others"
            )
    return origin, shape_Mhw


def _embeddings_of(
    buckets: Sequence[Index], config: DataConfig
) -> tuple[clip_embeddings.EmbeddingsOrigin | None, dict[str, tuple[int, ...]]]:
    """What the CLIP states were made of, where every sample has them, of the frames that are read; and their
    shape for each context."""
    if config.crop != "center" or config.flip:
        return None, {}
    for index in buckets:
        if not all(clip_embeddings.MEMBER in sample.members for sample in index.samples()):
            return None, {}
    index = next(index for index in buckets if len(index))
    try:
        with index.open(index.sample(0)) as read:
            file = TensorFile(partial(read, clip_embeddings.MEMBER), clip_embeddings.MEMBER)
            origin = clip_embeddings.read_origin(file)
            of_context = {
                context: clip_embeddings.embedding_shape(file, context)
                for context in ("image", "ends", "text")
            }
    except ValueError:
        return None, {}
    used = [shape for index, shape in zip(buckets, config.shapes, strict=True) if len(index)]
    fit = all((origin.height, origin.width) == (shape.height, shape.width) for shape in used)
    return (origin, of_context) if fit else (None, {})


def _wanted(shapes: Sequence[Shape]) -> str:
    return " or ".join(f"{s.num_frames} frames that fill {s.height} x {s.width} pixels" for s in shapes)


def _largest(index: Index) -> str:
    samples = list(index.samples())
    num_frames = max((sample.num_frames for sample in samples), default=0)
    height, width = max(((sample.height, sample.width) for sample in samples), default=(0, 0))
    return f"the longest has {num_frames} frames, the largest is {height} x {width}"
