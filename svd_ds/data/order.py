"""The order in which a run reads its samples: pure functions of (seed, position), the same on every machine.

    Order       one set of samples, endless: epoch after epoch, each a permutation of its own
    Interleave  several endless sequences in one, each by its share (mixtures, buckets)

Reads stay clustered: an epoch permutes the shards, then permutes the samples inside windows of
`SHARDS_PER_WINDOW` shards, so at any moment the whole run reads from about that many files. Nothing of
the size of the data set is kept: one window's permutation is made when the run reaches it.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def _state(key: Sequence[int]) -> int:
    state = 0
    for part in key:
        state = _mix(state ^ _mix(part & _MASK))
    return state


def permutation(length: int, *key: int) -> np.ndarray:
    """A permutation of range(length) that depends on nothing but `key`.

    Made by sorting hashes: no library promises that its shuffle stays the same from version to version.
    """
    hashes = _mix_array(np.arange(length, dtype=np.uint64) ^ np.uint64(_state(key)))
    return np.argsort(hashes, kind="stable")


class Order:
    """The endless order of a set of samples: position p is the (p % N)-th sample of epoch p // N."""

    def __init__(self, shard_sizes: Sequence[int], seed: int) -> None:
        """`shard_sizes`: samples in each shard; sample i of the set is counted through the shards in turn."""
        self.seed = seed
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.first_of_shard = np.cumsum(self.sizes) - self.sizes
        self.num_samples = int(self.sizes.sum())
        self._epoch, self._window = -1, -1

    def sample(self, position: int) -> int:
        """The number of the sample at `ordinal`, from 0 to N - 1. Ordinals that ascend are fast."""
        assert self.num_samples > 0, "an empty data set has no order"
        epoch, offset = divmod(position, self.num_samples)
        if epoch != self._epoch:
            self._begin_epoch(epoch)
        window = int(np.searchsorted(self._ends, offset, side="right"))
        if window != self._window:
            self._begin_window(window)
        return int(self._samples[offset - int(self._ends[window])])

    def _begin_epoch(self, epoch: int) -> None:
        shards = permutation(len(self.sizes), self.seed, epoch)
        starts = range(0, len(shards), SHARDS_PER_WINDOW)
        self._windows = [shards[start : start + SHARDS_PER_WINDOW] for start in starts]
        self._ends = np.cumsum([self.sizes[window].sum() for window in self._windows])
        self._epoch, self._window = epoch, -1

    def _begin_window(self, window: int) -> None:
        ranges = [self.first_of_shard[s] + np.arange(self.sizes[s]) for s in self._windows[window]]
        samples = np.concatenate(ranges)
        self._samples = samples[permutation(len(samples), self.seed, self._epoch, window)]
        self._window = window


class Interleave:
    """Several endless sequences in one, each by its share: who stands at a place is found at once.

    Item k of sequence i stands at time (k + jitter) / share_i, with a jitter in [0, 1) hashed from (key, i,
    k), and the items follow each other in time. So the order is random, every sequence's own order is kept,
    and in each prefix every sequence has its share to within one item a sequence.
    """

    def __init__(self, shares: Sequence[float], *key: int) -> None:
        """`shares`: positive or 0, in any unit."""
        self.shares = [(i, share) for i, share in enumerate(shares) if share > 0]
        assert self.shares, "nothing has a share"
        self.total = sum(share for _, share in self.shares)
        self._key = _state(key)

    def at(self, place: int) -> tuple[int, int]:
        """(sequence, number of the item in it) that stands at `place`, both from 0."""
        if len(self.shares) == 1:
            return self.shares[0][0], place
        # Before this time there are at most `place` items, of which these are certain.
        time = max(0.0, (place - len(self.shares)) / self.total)
        passed = {i: int(share * time) for i, share in self.shares}
        upcoming = {i: self._time(i, passed[i], share) for i, share in self.shares}
        shares = dict(self.shares)
        for _ in range(place - sum(passed.values())):
            i = min(upcoming, key=lambda i: (upcoming[i], i))
            passed[i] += 1
            upcoming[i] = self._time(i, passed[i], shares[i])
        i = min(upcoming, key=lambda i: (upcoming[i], i))
        return i, passed[i]

    def _time(self, i: int, k: int, share: float) -> float:
        jitter = _mix(self._key ^ _mix(_mix(i) ^ k)) / 2**64
        return (k + jitter) / share
