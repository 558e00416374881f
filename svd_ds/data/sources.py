"""Opening of a run's data sets: the samples that are read, their buckets, and their cached tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from svd_ds.data import clip_embeddings, latents
from svd_ds.data.cached_tensors import TensorFile
from svd_ds.data.clips import covers
from svd_ds.data.config import DataConfig, Shape
from svd_ds.data.filters import select_samples
from svd_ds.data.folders import INDEX_NAME, Folder
from svd_ds.data.motion import MotionMap
from svd_ds.data.quarantine import Fault, Quarantine
from svd_ds.data.read_timeout import with_timeout
from svd_ds.data.sample import Sample, Shard
from svd_ds.data.shards import Index


@dataclass(frozen=True)
class DatasetSource:
    """Data set of a run."""

    path: str
    """Local path or URL, as in the config."""
    weight: float
    """Share of the run's clips that this data set supplies, in any unit."""
    buckets: tuple[Index, ...]
    """Index of the samples of each bucket."""
    num_left_out: int
    """Number of samples that are in no bucket."""
    faults: tuple[Fault, ...]
    """Faults of the samples whose index lines are damaged."""
    notes: tuple[str, ...]
    """Remarks for the user on the samples that were left out."""
    latents_origin: latents.LatentsOrigin | None
    """Source of the cached latents; None decodes every frame."""
    latents_shape: tuple[int, ...]
    """Shape (M, h, w) of the moments of the first sample, which all samples must have to be batched."""
    embeddings_origin: clip_embeddings.EmbeddingsOrigin | None
    """Source of the cached CLIP embeddings; None if a sample has none."""
    embeddings_shapes: dict[str, tuple[int, ...]]
    """Context -> shape of the first sample's CLIP embeddings, see `clip_embeddings.embedding_shape`."""

    @property
    def motion_map(self) -> MotionMap:
        """Map from motion scores to motion buckets of this data set."""
        return self.buckets[0].motion_map

    @property
    def files(self) -> tuple[Folder, tuple[Shard, ...]]:
        """Folder and shards of the data set."""
        return self.buckets[0].folder, self.buckets[0].shards

    def __len__(self) -> int:
        return sum(map(len, self.buckets))


def open_dataset(path: str, weight: float, config: DataConfig, folder: Folder) -> DatasetSource:
    """Open a data set and choose the samples that a run reads.

    Args:
        path: path or URL in the config.
        weight: share of the clips, in any unit.
        config: settings of the data.
        folder: folder of the data set.

    Raises:
        ValueError: the index is damaged, no sample can be drawn, or cached latents that are to be read are
            missing.
        OSError: the index or a shard is missing, or a read hangs.
    """
    seconds = config.read_timeout_seconds
    hung = f"reading {folder.location(INDEX_NAME)} has hung for data.read_timeout_seconds={seconds:g}"
    loaded = with_timeout(lambda: Index.load(folder), seconds, hung)
    intact, faults = loaded.drop_damaged(Quarantine(config.max_quarantined, len(loaded)))
    selection = select_samples(config.where, intact)
    chosen = intact.keep(selection) if config.where else intact
    if not len(chosen):
        raise ValueError(
            f"none of the {len(intact)} samples in {path} meets data.where=[{', '.join(config.where)}]"
        )
    shapes = config.shapes
    buckets = chosen.split(lambda sample: choose_bucket(sample, config, shapes), len(shapes))
    if not any(map(len, buckets)):
        raise ValueError(
            f"none of the {len(chosen)} samples in {path} has {_describe_shapes(shapes)}: "
            f"{_describe_largest(chosen)}"
        )
    origin, latents_shape = _read_latents_origin(path, buckets, shapes) if config.latents else (None, ())
    embeddings_origin, embeddings_shapes = _read_embeddings_origin(buckets, config)
    return DatasetSource(
        path=path,
        weight=weight,
        buckets=tuple(buckets),
        num_left_out=len(intact) - sum(map(len, buckets)),
        faults=tuple(faults),
        notes=selection.notes,
        latents_origin=origin,
        latents_shape=latents_shape,
        embeddings_origin=embeddings_origin,
        embeddings_shapes=embeddings_shapes,
    )


def choose_bucket(sample: Sample, config: DataConfig, shapes: Sequence[Shape]) -> int | None:
    """Choose the bucket of a sample.

    A bucket is possible if the sample is long enough, and large enough that it need not be enlarged. The
    chosen one has the nearest aspect ratio, then the most frames, then the most pixels; a bucket of stills is
    chosen for a video only if there is no other.

    Args:
        sample: entry of the index.
        config: settings of the data.
        shapes: shape of each bucket.

    Returns:
        The number of the bucket; None if no bucket is possible.
    """
    best: tuple[tuple[bool, float, int, int], int] | None = None
    for number, shape in enumerate(shapes):
        is_long_enough = sample.num_frames >= shape.num_frames or (
            sample.num_frames == 1 and config.image_share > 0
        )
        if not is_long_enough or not covers((sample.height, sample.width), (shape.height, shape.width)):
            continue
        stretch = math.log(sample.height * shape.width / (sample.width * shape.height))
        # Rounded, since the sides of shapes are multiples and their aspect ratios differ slightly.
        rank = (
            shape.num_frames > 1,
            -round(abs(stretch), 1),
            shape.num_frames,
            shape.height * shape.width,
        )
        if best is None or rank > best[0]:
            best = (rank, number)
    return None if best is None else best[1]


def _read_latents_origin(
    path: str, buckets: Sequence[Index], shapes: Sequence[Shape]
) -> tuple[latents.LatentsOrigin, tuple[int, ...]]:
    """Read the source and the shape (M, h, w) of the cached latents from the first sample.

    Raises:
        ValueError: a sample has no latents, or the size of the encoded frames is not that of the clips.
    """
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
                f"the latents in {path} are of {origin.height} x {origin.width} pixels, but data.height x "
                f"data.width is {shape.height} x {shape.width}; tools/encode.py --size sets the size"
            )
    return origin, shape_Mhw


def _read_embeddings_origin(
    buckets: Sequence[Index], config: DataConfig
) -> tuple[clip_embeddings.EmbeddingsOrigin | None, dict[str, tuple[int, ...]]]:
    """Read the source of the cached CLIP embeddings, and their shape for each context, from the first sample.

    Returns:
        (None, {}) if a sample has no CLIP embeddings, or their crop or size is not that of the clips.
    """
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
            shapes = {
                context: clip_embeddings.embedding_shape(file, context)
                for context in ("image", "ends", "text")
            }
    except ValueError:
        return None, {}
    used = [shape for index, shape in zip(buckets, config.shapes, strict=True) if len(index)]
    is_same_size = all((origin.height, origin.width) == (shape.height, shape.width) for shape in used)
    return (origin, shapes) if is_same_size else (None, {})


def _describe_shapes(shapes: Sequence[Shape]) -> str:
    return " or ".join(f"{s.num_frames} frames that cover {s.height} x {s.width} pixels" for s in shapes)


def _describe_largest(index: Index) -> str:
    samples = list(index.samples())
    num_frames = max((sample.num_frames for sample in samples), default=0)
    height, width = max(((sample.height, sample.width) for sample in samples), default=(0, 0))
    return f"the longest has {num_frames} frames, the largest is {height} x {width}"
