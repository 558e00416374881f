"""Data loader of a rank, in five steps. This is the only module that imports webdataset.

1. schedule.py maps the sample ordinals of the run's global order to samples, and gives this rank its
   micro-batches of ordinals.
2. The micro-batches are distributed to the worker processes round-robin, and collected in the same order, so
   the number of workers changes only the speed.
3. A worker reads each sample and makes a clip of it (reader.py). A sample that cannot be read is replaced by
   the next sample in the order of its data set; this depends on the ordinal alone, not on the rank.
4. Clips are stacked to a `Batch`.
5. The main process pairs each batch with the cursor after its global step, and counts the replaced samples. A
   run resumes from that cursor with the next step, at any number of ranks and workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO

import fsspec
import webdataset
from torch.utils.data import get_worker_info
from webdataset.gopen import gopen, gopen_schemes

from svd_ds.batch import Batch, Clip
from svd_ds.cli import USER_ERRORS, same_kind
from svd_ds.data import workers
from svd_ds.data.batching import BatchConfig
from svd_ds.data.config import DataConfig
from svd_ds.data.cursor import Cursor
from svd_ds.data.folders import check_cache_size, open_folder
from svd_ds.data.motion import MotionMap
from svd_ds.data.order import SHARDS_PER_WINDOW
from svd_ds.data.quarantine import Fault, Quarantine
from svd_ds.data.reader import Reader, UnreadableError
from svd_ds.data.sample import Sample
from svd_ds.data.schedule import MicroBatch, Schedule
from svd_ds.data.sources import DatasetSource, open_dataset


class Loader:
    """Endless iterator of one rank over (micro-batch, cursor after the global step that it belongs to)."""

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        rank: int,
        world: int,
        batch: BatchConfig,
        cursor: Cursor | None = None,
        context: str | None = None,
        read_last_frame: bool = False,
    ) -> None:
        """Open the data sets of a run and check them.

        Args:
            config: settings of the data.
            seed: seed of the run (run.seed).
            rank: rank of this process.
            world: number of ranks.
            batch: size of the global batch, and of a micro-batch if there are no buckets.
            cursor: cursor of the run that is resumed; None starts at sample ordinal 0.
            context: kind of the cached CLIP embeddings to read, if all samples have them: image, ends or
                text.
            read_last_frame: with cached latents, read the pixels of a clip's last frame as well as its first.

        Raises:
            ValueError: the batch sizes do not divide, a shard is truncated, no sample is long and large
                enough, latents are missing or have another size, or the cursor belongs to other data.
            OSError: a shard is missing, or cannot be read.
        """
        assert 0 <= rank < world, f"rank {rank} of {world}"
        self.config, self.rank, self.world = config, rank, world
        self.split = batch.split(world, config.buckets)
        self.sources = _open_sources(config)
        buckets = list(zip(*(source.buckets for source in self.sources), strict=True))
        self.micro_batch = self.split.micro[config.shapes.index(config.shape)]
        """Clips of a micro-batch of the main shape (`DataConfig.shape`)."""
        self.notes = [note for source in self.sources for note in source.notes]
        """Remarks for the user on the samples that are left out."""
        self.num_left_out = sum(source.num_left_out for source in self.sources)
        self.fingerprint = self._fingerprint(batch.size)
        self.cursor = cursor or Cursor(0, self.fingerprint)
        self.cursor.check(self.fingerprint, config.set_names)
        self._faults = [fault for source in self.sources for fault in source.faults]
        self.quarantine = Quarantine(config.max_quarantined, len(self) + len(self._faults))
        self.quarantine.add(self._faults)
        self._unreadable: dict[tuple[int, int, int], Fault] = {}
        """(bucket, data set, sample number) -> fault of a damaged sample; this process reads each only
        once."""
        self.context = context if context and self._has_embeddings(context) else None
        weights = [source.weight for source in self.sources]
        sizes = [[index.shard_sizes for index in indices] for indices in buckets]
        self._schedule = Schedule(sizes, weights, self.split, seed)
        motion_map = MotionMap.mixture([source.motion_map for source in self.sources], weights)
        self._readers = [
            [Reader(config, shape, source, index, motion_map, seed, self.context, read_last_frame)
             for source, index in zip(self.sources, indices, strict=True)]
            for shape, indices in zip(config.shapes, buckets, strict=True)
        ]  # fmt: skip

    def __len__(self) -> int:
        """Number of samples of one epoch."""
        return sum(map(len, self.sources))

    def samples(self) -> Iterator[Sample]:
        """Iterate over every sample that the run can draw."""
        return (sample for source in self.sources for index in source.buckets for sample in index.samples())

    def __iter__(self) -> Iterator[tuple[Batch, Cursor]]:
        """Iterate over (batch, cursor after its global step), without end.

        Raises:
            ValueError: more samples are unreadable than data.max_quarantined allows; the message names the
                shard and the sample.
            OSError: the same, if the last sample failed with an error that a retry may fix; or a read hangs.
        """
        faults: list[Fault] = []
        end = self.cursor.next_ordinal
        for item in self._items():
            if not isinstance(item, _WorkerItem):
                raise item
            if item.end != end:
                # Faults are counted at the end of a step, so that all ranks stop at the same step.
                self.quarantine.add(faults)
                faults, end = [], item.end
            faults += item.faults
            self._faults += item.faults
            if item.batch is None:
                self.quarantine.add(faults)
                last = faults[-1]
                raise last.error(f"no sample in {self.config.set_names} can be read: {last.cause}")
            yield item.batch, Cursor(end, self.fingerprint)

    def pop_faults(self) -> list[Fault]:
        """Return and clear the faults of the samples that were replaced since the last call."""
        faults, self._faults = self._faults, []
        return faults

    def _items(self) -> Iterator[_WorkerItem | ValueError | OSError]:
        """Iterate over the results of the micro-batches in order, read in this process or in workers."""
        pipeline = webdataset.DataPipeline(self._micro_batches, webdataset.map(self._read), _yield_errors)
        if self.config.num_workers == 0:
            return iter(pipeline)
        return workers.iterate_in_workers(
            pipeline, self.config.num_workers, self.config.prefetch, __name__, self.rank
        )

    def _micro_batches(self) -> Iterator[MicroBatch]:
        """Yield the micro-batches of this rank that this worker process reads."""
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        start = self.cursor.next_ordinal
        return self._schedule.micro_batches(start, self.rank, number, num_workers)

    def _read(self, micro: MicroBatch) -> _WorkerItem:
        """Read the clips of a micro-batch and stack them."""
        clips: list[Clip] = []
        faults: list[Fault] = []
        for ordinal in micro.ordinals:
            clip = self._read_clip(ordinal, faults)
            if clip is None:
                return _WorkerItem(None, micro.end, faults)
            clips.append(clip)
        return _WorkerItem(Batch.from_clips(clips, micro.num_micro_batches), micro.end, faults)

    def _read_clip(self, ordinal: int, faults: list[Fault]) -> Clip | None:
        """Read the clip of a sample ordinal, from the first of its candidate samples that can be read.

        The faults of the candidates that cannot be read are added to `faults`.

        Returns:
            The clip; None if more samples are unreadable than allowed.
        """
        num_earlier = len(faults)
        # Any 2 N consecutive samples of an order contain a complete epoch, so each of its N samples.
        for bucket, source, number in islice(self._schedule.samples(ordinal), 2 * len(self)):
            key = bucket, source, number
            fault = self._unreadable.get(key)
            try:
                if fault is None:
                    return self._readers[bucket][source].read(number, ordinal)
            except UnreadableError as error:
                fault = error.fault
                if not fault.is_retryable:
                    self._unreadable[key] = fault
            faults.append(fault)
            if len(set(faults[num_earlier:])) > self.quarantine.allowed:
                return None
        return None

    def _has_embeddings(self, context: str) -> bool:
        """Return True if every data set has CLIP embeddings for `context`, all of the same encoder."""
        origins = [source.embeddings_origin for source in self.sources]
        encoders = {None if origin is None else origin.encoder(context) for origin in origins}
        return len(encoders) == 1 and None not in encoders

    def _fingerprint(self, global_batch: int) -> str:
        """Return the fingerprint of the global order; with one data set and one bucket, that of its index."""
        indices = [index.fingerprint for source in self.sources for index in source.buckets]
        if len(indices) == 1:
            return indices[0]
        parts = [*indices, *(source.weight for source in self.sources)]
        if len(self.split.micro) > 1:
            # A step has one shape, so the shape of an ordinal depends on the number of clips of a step.
            parts.append(global_batch)
        return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:16]


def _open_sources(config: DataConfig) -> list[DatasetSource]:
    """Open the data sets of a run; see `Loader` for the errors."""
    sources = [
        open_dataset(path, weight, config, open_folder(path, config.cache, config.cache_gb, open_url))
        for path, weight in config.sets.items()
    ]
    check_cache_size([source.files for source in sources], SHARDS_PER_WINDOW, config.cache_gb)
    for bucket, shape in enumerate(config.shapes):
        if not any(len(source.buckets[bucket]) for source in sources):
            num_samples = sum(map(len, sources))
            raise ValueError(f"none of the {num_samples} samples in {config.set_names} fits bucket {shape}")
    return sources


@dataclass(frozen=True)
class _WorkerItem:
    """Result of a micro-batch, sent from a worker to the main process."""

    batch: Batch | None
    """Batch; None if more samples were unreadable than allowed."""
    end: int
    """Next sample ordinal of the run after the global step."""
    faults: list[Fault]
    """Samples that were replaced."""


def _yield_errors(items: Iterable[_WorkerItem]) -> Iterator[_WorkerItem | ValueError | OSError]:
    """Yield the items; yield an error that ends the run too, since torch would replace its message by a
    traceback."""
    try:
        yield from items
    except USER_ERRORS as error:
        # A plain ValueError or OSError, which any process can unpickle.
        yield same_kind(error, str(error))


def open_url(url: str) -> IO[bytes]:
    """Open a URL for reading by webdataset, or by fsspec if webdataset does not know the scheme (s3, ...)."""
    gopen_schemes["__default__"] = lambda url, mode, bufsize: fsspec.open(url, mode).open()
    return gopen(url)
