"""Global order of the samples over steps, buckets and data sets: a pure function of (seed, sample ordinal).

    sample ordinal p  ->  step p // G, with G the global batch size
    step              ->  one bucket, by the buckets' shares of the samples; its j-th step
    sample of a step  ->  sample j G + p % G of the bucket, taken from one data set, by the sets' weights
    data set          ->  its next sample in that bucket: each comes once an epoch (order.py)

With one bucket and one data set, p is the ordinal in that set's order.

    slot v of a step  ->  its v-th sample; rank r of W reads the slots with v mod W = r

Every rank therefore takes equally many steps of the same shapes, whatever the shards hold, and a run that
resumes at another number of ranks or workers keeps the order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from svd_ds.data.batching import BatchSplit
from svd_ds.data.order import Interleave, Order

STEPS, CLIPS = 1, 2
"""Keys of the two random choices: the bucket of a step, and the data set of a sample."""


@dataclass(frozen=True)
class MicroBatch:
    """Samples that one rank processes at once."""

    bucket: int
    ordinals: range
    """Sample ordinals."""
    num_micro_batches: int
    """Number of micro-batches of this rank in the step."""
    end: int
    """Sample ordinal at which the next step begins."""


class Schedule:
    """Global order of the samples over buckets and data sets."""

    def __init__(
        self,
        shard_sizes: Sequence[Sequence[Sequence[int]]],
        weights: Sequence[float],
        split: BatchSplit,
        seed: int,
    ) -> None:
        """Compute the shares of the buckets and data sets.

        Args:
            shard_sizes: number of samples by bucket, data set and shard.
            weights: share of the clips that each data set supplies, in any unit.
            split: the global batch, divided among the ranks.
            seed: seed of the run.
        """
        numbers = [[sum(sizes) for sizes in sets] for sets in shard_sizes]
        totals = [sum(column) for column in zip(*numbers, strict=True)]
        shares = [
            [weight * n / total for weight, n, total in zip(weights, row, totals, strict=True)]
            for row in numbers
        ]
        self.split = split
        self._steps = Interleave([sum(row) for row in shares], seed, STEPS)
        self._clips = [Interleave(row, seed, CLIPS, bucket) for bucket, row in enumerate(shares)]
        self._orders = [[Order(sizes, seed) for sizes in sets] for sets in shard_sizes]

    def samples(self, ordinal: int) -> Iterator[tuple[int, int, int]]:
        """Yield, without end, the sample of an ordinal and then the samples that may replace it.

        The replacements of an unreadable sample are the next ones in the order of its data set. Each item is
        (bucket, data set, number of the sample in both).
        """
        step, offset = divmod(ordinal, self.split.size)
        bucket, step_of_bucket = self._steps.at(step)
        source, first = self._clips[bucket].at(step_of_bucket * self.split.size + offset)
        order = self._orders[bucket][source]
        for number in count(first):
            yield bucket, source, order.sample(number)

    def micro_batches(
        self, start: int, rank: int, worker: int = 0, num_workers: int = 1
    ) -> Iterator[MicroBatch]:
        """Yield, without end, the micro-batches that one worker process of one rank reads.

        A rank's micro-batches go to its workers in turn.

        Args:
            start: sample ordinal at which the first step begins.
            rank: rank that reads.
            worker: number of the worker process, from 0.
            num_workers: number of worker processes of the rank.
        """
        number = 0
        size, world = self.split.size, self.split.world
        for begin in count(start, size):
            bucket, _ = self._steps.at(begin // size)
            span = world * self.split.micro[bucket]
            for first in range(begin, begin + size, span):
                if number % num_workers == worker:
                    ordinals = range(first + rank, first + span, world)
                    yield MicroBatch(bucket, ordinals, self.split.num_micro_batches(bucket), begin + size)
                number += 1
