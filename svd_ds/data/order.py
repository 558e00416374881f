"""The order in which a run reads its samples: pure functions of (seed, position), the same on every machine.

    position p of the run  ->  epoch p // N, the (p % N)-th sample of that epoch's permutation
    global step            ->  global_batch positions on end, from where the run stands
    stream v of a step     ->  its v-th position; rank r serves the streams v with v mod world = r

So every rank takes equally many steps whatever the shards hold, each sample comes once an epoch, and a run
that goes on at another number of ranks goes on in the same order.

Reads stay clustered: an epoch permutes the shards, then permutes the samples inside windows of
`SHARDS_PER_WINDOW` shards, so at any moment the whole run reads from about that many files. Nothing of
the size of the data set is kept: one window's permutation is made when the run reaches it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count

import numpy as np

SHARDS_PER_WINDOW = 8
"""Samples mix across so many shards. Changing it changes the order of every run."""

_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """The splitmix64 finaliser (Steele et al. 2014): a bijection on 64 bits that scatters its input."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_array(values: np.ndarray) -> np.ndarray:
    """`_mix` of every element of a uint64 array."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permutation(length: int, *key: int) -> np.ndarray:
    """A permutation of range(length) that depends on nothing but `key`.

    Made by sorting hashes: no library promises that its shuffle stays the same from version to version.
    """
    state = 0
    for part in key:
        state = _mix(state ^ _mix(part & _MASK))
    hashes = _mix_array(np.arange(length, dtype=np.uint64) ^ np.uint64(state))
    return np.argsort(hashes, kind="stable")


def samples_at(shard_sizes: Sequence[int], seed: int, positions: Iterable[int]) -> Iterator[tuple[int, int]]:
    """What stands at each of `positions` in the run's endless global order.

    Args:
        shard_sizes: samples in each shard; sample i of the data set is counted through the shards in turn.
        positions: from 0, any order; ascending is fast.

    Yields: (position, sample), the sample's number from 0 to sum(shard_sizes) - 1.
    """
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    first_of_shard = np.cumsum(sizes) - sizes
    num_samples = int(sizes.sum())
    assert num_samples > 0, "an empty data set has no order"
    epoch, window = -1, -1
    for position in positions:
        if position // num_samples != epoch:
            epoch, window = position // num_samples, -1
            shards = permutation(len(sizes), seed, epoch)
            windows = [shards[i : i + SHARDS_PER_WINDOW] for i in range(0, len(shards), SHARDS_PER_WINDOW)]
            ends = np.cumsum([sizes[w].sum() for w in windows])
        offset = position % num_samples
        here = int(np.searchsorted(ends, offset, side="right"))
        if here != window:
            window = here
            samples = np.concatenate([first_of_shard[s] + np.arange(sizes[s]) for s in windows[window]])
            samples = samples[permutation(len(samples), seed, epoch, window)]
            start = int(ends[window]) - len(samples)
        yield position, int(samples[offset - start])


def rank_positions(
    start: int, rank: int, world: int, micro_batch: int, worker: int = 0, num_workers: int = 1
) -> Iterator[int]:
    """The positions that one worker process of one rank reads, for ever.

    `start` is the position of the run's first global step from here on. The rank's micro-batches are dealt to
    its workers in turn. As a global batch is a multiple of world x micro_batch, none straddles two steps.
    """
    span = world * micro_batch
    for number in count(worker, num_workers):
        first = start + number * span + rank
        yield from range(first, first + span, world)


def step_end(start: int, position: int, global_batch: int) -> int:
    """Where the run stands after the global step that reads `position`."""
    return start + ((position - start) // global_batch + 1) * global_batch
