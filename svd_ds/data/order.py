"""Order of the samples of a run: pure functions of (seed, ordinal), the same on every machine.

    Order       endless order of one set of samples: each epoch is another permutation
    Interleave  several endless sequences merged into one by their shares (mixtures, buckets)

An ordinal counts the items of an endless sequence from 0.

Reads are clustered: an epoch permutes the shards, then the samples inside windows of `SHARDS_PER_WINDOW`
shards, so the run reads from about that many files at a time. Memory does not grow with the data set: the
permutation of a window is computed when the run reaches it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHARDS_PER_WINDOW = 8
"""Number of shards whose samples are mixed. Changing it changes the order of every run."""

_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """Hash 64 bits by the splitmix64 finaliser, a bijection (Steele et al. 2014, Fast Splittable Pseudorandom
    Number Generators)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix_array(values: np.ndarray) -> np.ndarray:
    """Apply `_mix` to every element of a uint64 array."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _hash_key(key: Sequence[int]) -> int:
    """Hash a sequence of integers to 64 bits."""
    state = 0
    for part in key:
        state = _mix(state ^ _mix(part & _MASK))
    return state


def permutation(length: int, *key: int) -> np.ndarray:
    """Return a permutation of range(length), int64, (length,), that depends on `key` alone.

    It sorts hashes: no library guarantees that its shuffle stays the same in later versions.
    """
    hashes = _mix_array(np.arange(length, dtype=np.uint64) ^ np.uint64(_hash_key(key)))
    return np.argsort(hashes, kind="stable")


class Order:
    """Endless order of a set of N samples: ordinal n is the (n % N)-th sample of epoch n // N."""

    def __init__(self, shard_sizes: Sequence[int], seed: int) -> None:
        """Make the order of a set.

        Args:
            shard_sizes: number of samples of each shard; samples are numbered through the shards in turn.
            seed: seed of the run.
        """
        self.seed = seed
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.first_of_shard = np.cumsum(self.sizes) - self.sizes
        self.num_samples = int(self.sizes.sum())
        self._epoch, self._window = -1, -1

    def sample(self, ordinal: int) -> int:
        """Return the number of the sample at an ordinal of this order, from 0 to N - 1; ascending ordinals
        are fast."""
        assert self.num_samples > 0, "an empty data set has no order"
        epoch, offset = divmod(ordinal, self.num_samples)
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
    """Endless sequence that merges several others by their shares, with random access.

    Item k of sequence i has the time (k + jitter) / share_i, with a jitter in [0, 1) hashed from (key, i, k),
    and the items are sorted by time. So the order is random, each sequence keeps its own order, and in each
    prefix each sequence has its share to within one item a sequence.
    """

    def __init__(self, shares: Sequence[float], *key: int) -> None:
        """Merge sequences.

        Args:
            shares: share of each sequence, at least 0, in any unit.
            key: seeds of the jitter.
        """
        self.shares = [(i, share) for i, share in enumerate(shares) if share > 0]
        assert self.shares, "at least one share must be above 0"
        self.total = sum(share for _, share in self.shares)
        self._key = _hash_key(key)

    def at(self, ordinal: int) -> tuple[int, int]:
        """Return (sequence, ordinal in that sequence) of the item at an ordinal of the merged sequence."""
        if len(self.shares) == 1:
            return self.shares[0][0], ordinal
        # At most `ordinal` items are before this time; those counted in `passed` are certainly before it.
        time = max(0.0, (ordinal - len(self.shares)) / self.total)
        passed = {i: int(share * time) for i, share in self.shares}
        upcoming = {i: self._time(i, passed[i], share) for i, share in self.shares}
        shares = dict(self.shares)
        for _ in range(ordinal - sum(passed.values())):
            i = min(upcoming, key=lambda i: (upcoming[i], i))
            passed[i] += 1
            upcoming[i] = self._time(i, passed[i], shares[i])
        i = min(upcoming, key=lambda i: (upcoming[i], i))
        return i, passed[i]

    def _time(self, i: int, k: int, share: float) -> float:
        jitter = _mix(self._key ^ _mix(_mix(i) ^ k)) / 2**64
        return (k + jitter) / share
