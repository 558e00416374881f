"""What a run reads at each position of its global order: a pure function of (seed, position).

    position p      ->  step p // G, with G the global batch
    step            ->  one bucket, by the buckets' shares of the samples; its j-th step
    clip of a step  ->  place j G + p % G of the bucket, taken by one data set, by the sets' shares
    data set        ->  its next sample in that bucket: each comes once an epoch (order.py)

With one bucket and one data set, position p is simply place p of that set's order.

    stream v of a step  ->  its v-th position; rank r of W serves the streams v with v mod W = r

So every rank takes equally many steps of one shape, whatever the shards hold, and a run that goes on at
another number of ranks or workers goes on in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from svd_ds.data.order import Interleave, Order

STEPS, CLIPS = 1, 2
"""Keys of the two choices: which bucket a step takes, and which data set a clip."""


@dataclass(frozen=True)
class MicroBatch:
    """What a rank takes at once."""

    bucket: int
    ordinals: range
    accumulation: int
    """Micro-batches that a rank takes in this step."""
    end: int
    """Where the whole run stands behind the step."""


class Schedule:
    """The global order over buckets and data sets."""

    def __init__(
        self,
        shard_sizes: Sequence[Sequence[Sequence[int]]],
        weights: Sequence[float],
        micro_batches: Sequence[int],
        seed: int,
        global_batch: int,
    ) -> None:
        """
        Args:
            shard_sizes: samples by bucket, data set and shard.
            weights: of each data set: its share of the clips, in any unit.
            micro_batches: clips a rank takes at once, of each bucket.
            global_batch: clips a step over all ranks, of any bucket.
        """
        numbers = [[sum(sizes) for sizes in sets] for sets in shard_sizes]
        totals = [sum(column) for column in zip(*numbers, strict=True)]
        shares = [
            [weight * n / total for weight, n, total in zip(weights, row, totals, strict=True)]
            for row in numbers
        ]
        self.global_batch, self.micro_batches = global_batch, tuple(micro_batches)
        self._steps = Interleave([sum(row) for row in shares], seed, STEPS)
        self._clips = [Interleave(row, seed, CLIPS, bucket) for bucket, row in enumerate(shares)]
        self._orders = [[Order(sizes, seed) for sizes in sets] for sets in shard_sizes]

    def samples(self, ordinal: int) -> Iterator[tuple[int, int, int]]:
        """(bucket, data set, sample's number in them) at a position; then, without end, those that take its
        place where it cannot be read: the next ones of its set's order."""
        step, offset = divmod(ordinal, self.global_batch)
        bucket, step_of_bucket = self._steps.at(step)
        source, first = self._clips[bucket].at(step_of_bucket * self.global_batch + offset)
        order = self._orders[bucket][source]
        for place in count(first):
            yield bucket, source, order.sample(place)

    def micro_batches_of(
        self, start: int, rank: int, world: int, worker: int = 0, num_workers: int = 1
    ) -> Iterator[MicroBatch]:
        """What one worker process of one rank reads, for ever: the rank's micro-batches are dealt to its
        workers in turn. `start` is the position of the run's first step from here on."""
        number = 0
        for begin in count(start, self.global_batch):
            bucket, _ = self._steps.at(begin // self.global_batch)
            end = begin + self.global_batch
            span = world * self.micro_batches[bucket]
            for first in range(begin, end, span):
                if number % num_workers == worker:
                    ordinals = range(first + rank, first + span, world)
                    yield MicroBatch(bucket, ordinals, self.global_batch // span, end)
                number += 1
