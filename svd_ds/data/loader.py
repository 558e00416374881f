"""The loader, told in five steps. This is the only module that imports webdataset.

1. schedule.py says which positions of the run's global order this rank reads, in which micro-batches, and
   which samples stand there.
2. The micro-batches are dealt to the worker processes in turn, and collected in turn, so the number of
   workers changes nothing but the speed.
3. A worker reads each sample and makes a clip of it (reader.py). One that cannot be read gives its place to
   the next sample of its set's order, wherever and whenever the place is read.
4. Clips are stacked to a `Batch`.
5. The main process pairs each batch with the cursor behind its global step, and counts what was replaced. A
   run that is given that cursor goes on with the next step, at any number of ranks and workers.
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
from svd_ds.data.sources import open_dataset


class Loader:
    """The endless (micro-batch, cursor behind the global step that it belongs to) of one rank."""

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        rank: int,
        world: int,
        batch: BatchConfig,
        cursor: Cursor | None = None,
        context: str | None = None,
        ends: bool = False,
    ) -> None:
        """
        Args:
            batch: size of the global batch, and of a micro-batch where there are no buckets.
            cursor: where an earlier run stopped; None begins.
            context: which CLIP states are read, where all samples have them: image, ends or text.
            ends: whether, beside latents, the pixels of a clip's last frame come with its first's.

        Raises ValueError or OSError for batches that do not divide, shards that are missing or truncated,
        data without a clip that is long and large enough, latents that are missing or of another size, a
        cursor that belongs to other data.
        """
        assert 0 <= rank < world, f"rank {rank} of {world}"
        self.config, self.rank, self.world = config, rank, world
        self.split = batch.split(world, config.buckets)
        self.sources = [
            open_dataset(path, weight, config, open_folder(path, config.cache, config.cache_gb, open_url))
            for path, weight in config.sets.items()
        ]
        check_cache_size([source.files for source in self.sources], SHARDS_PER_WINDOW, config.cache_gb)
        buckets = list(zip(*(source.buckets for source in self.sources), strict=True))
        for shape, indices in zip(config.shapes, buckets, strict=True):
            if not any(map(len, indices)):
                raise ValueError(f"none of the {len(self)} samples in {config.set_names} fits bucket {shape}")

        self.micro_batch = self.split.micro[config.shapes.index(config.shape)]
        """Clips of the main shape that a rank processes at once."""
        self.notes = [note for source in self.sources for note in source.notes]
        """What a user should know of the samples that are left out."""
        self.num_left_out = sum(source.num_left_out for source in self.sources)
        self.fingerprint = self._fingerprint(batch.size)
        self.cursor = cursor or Cursor(0, self.fingerprint)
        self.cursor.check(self.fingerprint, config.set_names)
        self._faults = [fault for source in self.sources for fault in source.faults]
        self.quarantine = Quarantine(config.max_quarantined, len(self) + len(self._faults))
        self.quarantine.add(self._faults)
        self._unreadable: dict[tuple[int, int, int], Fault] = {}
        """(bucket, source, number) of the samples that this process has found damaged: each is tried once."""
        self.context = context if context and self._has_embeddings(context) else None
        weights = [source.weight for source in self.sources]
        sizes = [[index.shard_sizes for index in indices] for indices in buckets]
        self._schedule = Schedule(sizes, weights, self.split, seed)
        motion_map = MotionMap.mixture([source.motion_map for source in self.sources], weights)
        self._readers = [
            [Reader(config, shape, source, index, motion_map, seed, self.context, ends)
             for source, index in zip(self.sources, indices, strict=True)]
            for shape, indices in zip(config.shapes, buckets, strict=True)
        ]  # fmt: skip

    def __len__(self) -> int:
        """Samples of one epoch."""
        return sum(map(len, self.sources))

    def samples(self) -> Iterator[Sample]:
        """Every sample that the run could draw."""
        return (sample for source in self.sources for index in source.buckets for sample in index.samples())

    def __iter__(self) -> Iterator[tuple[Batch, Cursor]]:
        """Raises ValueError, naming shard and sample, where more cannot be read than data.max_quarantined
        allows; OSError where that may pass, or a read hangs."""
        faults: list[Fault] = []
        end = self.cursor.next_ordinal
        for item in self._items():
            if not isinstance(item, _Item):
                raise item
            if item.end != end:
                # Behind the step: a run's ranks count together there, and stop together where it is too much.
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
        """What was replaced in the batches since the last call."""
        taken, self._faults = self._faults, []
        return taken

    def _items(self) -> Iterator[_Item | ValueError | OSError]:
        pipeline = webdataset.DataPipeline(self._micro_batches, webdataset.map(self._read), _stops_as_values)
        if self.config.num_workers == 0:
            return iter(pipeline)
        return workers.iterate_in_workers(
            pipeline, self.config.num_workers, self.config.prefetch, __name__, self.rank
        )

    def _micro_batches(self) -> Iterator[MicroBatch]:
        """Those of this rank that fall to this worker process."""
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        start = self.cursor.next_ordinal
        return self._schedule.micro_batches(start, self.rank, number, num_workers)

    def _read(self, micro: MicroBatch) -> _Item:
        clips: list[Clip] = []
        faults: list[Fault] = []
        for ordinal in micro.ordinals:
            clip = self._read_clip(ordinal, faults)
            if clip is None:
                return _Item(None, micro.end, faults)
            clips.append(clip)
        return _Item(Batch.from_clips(clips, micro.num_micro_batches), micro.end, faults)

    def _read_clip(self, ordinal: int, faults: list[Fault]) -> Clip | None:
        """The first sample for a position that can be read; those before it are added to `faults`. None where
        more than allowed cannot."""
        found = len(faults)
        # In twice a set's length of its order each of its samples stands.
        for bucket, source, number in islice(self._schedule.samples(ordinal), 2 * len(self)):
            place = bucket, source, number
            fault = self._unreadable.get(place)
            try:
                if fault is None:
                    return self._readers[bucket][source].read(number, ordinal)
            except UnreadableError as error:
                fault = error.fault
                if not fault.is_retryable:
                    self._unreadable[place] = fault
            faults.append(fault)
            if len(set(faults[found:])) > self.quarantine.allowed:
                return None
        return None

    def _has_embeddings(self, context: str) -> bool:
        """Whether every data set has them, all of one encoder."""
        origins = [source.embeddings_origin for source in self.sources]
        encoders = {None if origin is None else origin.encoder(context) for origin in origins}
        return len(encoders) == 1 and None not in encoders

    def _fingerprint(self, global_batch: int) -> str:
        """Names the order that positions count: of one data set in one bucket, that of its index."""
        indices = [index.fingerprint for source in self.sources for index in source.buckets]
        if len(indices) == 1:
            return indices[0]
        told = [*indices, *(source.weight for source in self.sources)]
        if len(self.split.micro) > 1:
            # A step has one shape: which clips stand in which depends on how many it takes.
            told.append(global_batch)
        return hashlib.sha256(" ".join(map(str, told)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Item:
    """What a worker hands over."""

    batch: Batch | None
    """None where more than allowed could not be read."""
    end: int
    faults: list[Fault]


def _stops_as_values(items: Iterable[_Item]) -> Iterator[_Item | ValueError | OSError]:
    """What ends the run as the last item: torch would wrap what is raised in the text of a traceback."""
    try:
        yield from items
    except USER_ERRORS as error:
        # Of a plain kind, which any process can unpack.
        yield same_kind(error, str(error))


def open_url(url: str) -> IO[bytes]:
    """Open a URL by webdataset's openers, and where these do not know the scheme (s3, memory, ...) by
    fsspec."""
    gopen_schemes["__default__"] = lambda url, mode, bufsize: fsspec.open(url, mode).open()
    return gopen(url)
