"""The global order is a pure function with each sample once an epoch, for any sets, buckets, ranks and
workers."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from svd_ds.data.batching import BatchSplit
from svd_ds.data.order import SHARDS_PER_WINDOW, Interleave, Order, permutation
from svd_ds.data.schedule import MicroBatch, Schedule

SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any)


def order(shard_sizes: list[int], seed: int, ordinals: range) -> list[int]:
    found = Order(shard_sizes, seed)
    return [found.sample(ordinal) for ordinal in ordinals]


@given(SIZES, st.integers(0, 2**63), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_each_sample_is_read_once_an_epoch(sizes: list[int], seed: int, epoch: int) -> None:
    total = sum(sizes)
    assert sorted(order(sizes, seed, range(epoch * total, (epoch + 1) * total))) == list(range(total))


@given(SIZES, st.integers(0, 100), st.data())
@settings(max_examples=60, deadline=None)
def test_sample_of_an_ordinal_does_not_depend_on_earlier_reads(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    whole = order(sizes, seed, range(3 * sum(sizes)))
    found = Order(sizes, seed)
    for ordinal in data.draw(st.lists(st.integers(0, 3 * sum(sizes) - 1), max_size=8)):
        assert found.sample(ordinal) == whole[ordinal]


def test_order_equals_recorded_values() -> None:
    # Golden values: a run that is resumed years later on another machine continues in this order.
    assert permutation(8, 0, 0).tolist() == [7, 1, 6, 0, 3, 5, 4, 2]
    assert order([3, 1, 5], 0, range(18)) == [5, 3, 8, 7, 1, 6, 4, 2, 0, 1, 6, 8, 5, 2, 4, 3, 0, 7]
    mixed = Interleave([2, 1], 0)
    assert [mixed.at(ordinal)[0] for ordinal in range(12)] == MIXED


MIXED = [0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 1]


def test_epochs_and_seeds_differ() -> None:
    sizes = [16, 16, 16]
    orders = [order(sizes, seed, range(e * 48, e * 48 + 48)) for seed in range(3) for e in range(3)]
    assert len({tuple(o) for o in orders}) == 9


def test_permutations_are_uniform() -> None:
    count = 6000
    drawn = np.array([permutation(3, seed, 7) for seed in range(count)])
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 6
    assert abs(counts - count / 6).max() < 5 * (count / 6) ** 0.5


def test_reads_stay_within_a_window_of_shards() -> None:
    sizes = [10] * 40
    shard_of = [sample // 10 for sample in order(sizes, 1, range(400))]
    span = 10 * SHARDS_PER_WINDOW
    for start in range(0, 400, span):
        assert len(set(shard_of[start : start + span])) == SHARDS_PER_WINDOW
    assert shard_of[: len(sizes)] != sorted(shard_of[: len(sizes)])


@given(
    st.lists(st.floats(0.01, 100) | st.just(0.0), min_size=1, max_size=6).filter(any),
    st.integers(0, 10),
    st.integers(0, 10**9),
)
@settings(max_examples=60, deadline=None)
def test_interleave_keeps_shares_and_orders_with_random_access(
    shares: list[float], key: int, far: int
) -> None:
    mixed = Interleave(shares, key)
    seen = Counter()  # type: ignore[var-annotated]
    for ordinal in range(200):
        sequence, item = mixed.at(ordinal)
        assert item == seen[sequence], "each sequence in its own order, nothing twice, nothing left out"
        seen[sequence] += 1
        for other, share in enumerate(shares):
            assert abs(seen[other] - share / sum(shares) * (ordinal + 1)) <= len(shares)
    reached = [mixed.at(ordinal) for ordinal in range(far, far + 30)]
    for sequence in {sequence for sequence, _ in reached}:
        items = [item for other, item in reached if other == sequence]
        assert items == list(range(items[0], items[0] + len(items)))
        assert items[0] == pytest.approx(shares[sequence] / sum(shares) * far, abs=len(shares) + 30)


def schedule(
    sizes: list[list[list[int]]], weights: list[float], micro: list[int], batch: int, world: int = 1
) -> Schedule:
    return Schedule(sizes, weights, BatchSplit(batch, world, tuple(micro)), seed=5)


@given(
    world=st.integers(1, 6),
    micro=st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3),
    num_workers=st.integers(1, 4),
    start=st.integers(0, 50),
)
@settings(max_examples=80, deadline=None)
def test_ranks_and_workers_share_the_steps_evenly(
    world: int, micro: list[int], num_workers: int, start: int
) -> None:
    batch, num_steps = 12 * world, 5
    sizes = [[[7 * (bucket + 1)]] for bucket in range(len(micro))]
    found = schedule(sizes, [1.0], micro, batch, world)
    # With one bucket a run may resume at any ordinal, since the batch size may have changed.
    start = start * batch if len(micro) > 1 else start
    every: list[list[MicroBatch]] = []
    for rank in range(world):
        workers = [found.micro_batches(start, rank, n, num_workers) for n in range(num_workers)]
        alone = found.micro_batches(start, rank)
        ours: list[MicroBatch] = []
        while not ours or ours[-1].end <= start + num_steps * batch or len(ours) % num_workers:
            # The loader collects one micro-batch from each worker in turn.
            ours.append(next(workers[len(ours) % num_workers]))
        assert ours == list(islice(alone, len(ours)))
        every.append([part for part in ours if part.end <= start + num_steps * batch])
    for parts in zip(*every, strict=True):
        assert len({(part.bucket, part.end, part.num_micro_batches) for part in parts}) == 1, (
            "one shape a step"
        )
        assert all(len(part.ordinals) == micro[part.bucket] for part in parts)
    read = [ordinal for parts in every for part in parts for ordinal in part.ordinals]
    assert sorted(read) == list(range(start, start + num_steps * batch))


@given(
    st.lists(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=2, max_size=2),
             min_size=1, max_size=3)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_each_sample_is_read_once_an_epoch_of_its_set_in_every_bucket(sizes: list[list[list[int]]]) -> None:
    assume(all(any(sum(bucket[i]) for bucket in sizes) for i in range(2)))
    assume(all(any(map(sum, bucket)) for bucket in sizes))
    found = schedule(sizes, [3.0, 1.0], [1] * len(sizes), batch=4)
    times = Counter(next(found.samples(ordinal)) for ordinal in range(800))
    buckets = Counter(bucket for bucket, _, _ in times.elements())
    for bucket, sets in enumerate(sizes):
        for source in range(2):
            counts = [times[bucket, source, number] for number in range(sum(sets[source]))]
            assert not counts or max(counts) - min(counts) <= 1
    totals = [sum(sum(bucket[source]) for bucket in sizes) for source in range(2)]
    for bucket, sets in enumerate(sizes):
        share = 0.75 * sum(sets[0]) / totals[0] + 0.25 * sum(sets[1]) / totals[1]
        assert abs(buckets[bucket] - 800 * share) <= 4 * len(sizes), "a bucket has its samples' share"


def test_replacement_of_an_unreadable_sample_is_the_next_of_its_order() -> None:
    found = schedule([[[3, 4]]], [1.0], [1], batch=2)
    epoch = [next(found.samples(ordinal))[2] for ordinal in range(7)]
    assert [number for _, _, number in islice(found.samples(2), 5)] == epoch[2:]


def test_empty_data_set_has_no_order() -> None:
    with pytest.raises(AssertionError):
        Order([0, 0], 0).sample(0)
