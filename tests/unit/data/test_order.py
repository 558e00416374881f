"""The global order: a pure function, each sample once an epoch, over any number of ranks and workers."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svd_ds.data.order import SHARDS_PER_WINDOW, permutation, rank_positions, samples_at, step_end

SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any)


def order(shard_sizes: list[int], seed: int, positions: range) -> list[int]:
    return [sample for _, sample in samples_at(shard_sizes, seed, positions)]


@given(SIZES, st.integers(0, 2**63), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_each_sample_once_an_epoch(sizes: list[int], seed: int, epoch: int) -> None:
    total = sum(sizes)
    assert sorted(order(sizes, seed, range(epoch * total, (epoch + 1) * total))) == list(range(total))


@given(SIZES, st.integers(0, 100), st.data())
@settings(max_examples=60, deadline=None)
def test_a_position_does_not_depend_on_what_was_read_before(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    whole = order(sizes, seed, range(3 * sum(sizes)))
    positions = data.draw(st.lists(st.integers(0, 3 * sum(sizes) - 1), max_size=8))
    assert [sample for _, sample in samples_at(sizes, seed, positions)] == [whole[p] for p in positions]


def test_the_order_never_changes() -> None:
    # Written down once: a run that is resumed years later, elsewhere, reads on in this order.
    assert permutation(8, 0, 0).tolist() == [7, 1, 6, 0, 3, 5, 4, 2]
    assert order([3, 1, 5], 0, range(18)) == [5, 3, 8, 7, 1, 6, 4, 2, 0, 1, 6, 8, 5, 2, 4, 3, 0, 7]


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
    world=st.integers(1, 6),
    micro_batch=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    num_workers=st.integers(1, 4),
    start=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_ranks_and_workers_share_the_positions_evenly(
    world: int, micro_batch: int, accumulation: int, num_workers: int, start: int
) -> None:
    global_batch, num_steps = world * micro_batch * accumulation, 4
    for_rank = accumulation * micro_batch
    everything: list[int] = []
    for rank in range(world):
        workers = [
            rank_positions(start, rank, world, micro_batch, n, num_workers) for n in range(num_workers)
        ]
        # The loader collects one micro-batch from each worker in turn.
        ours: list[int] = []
        for number in range(num_steps * accumulation):
            ours += islice(workers[number % num_workers], micro_batch)
        assert ours == list(islice(rank_positions(start, rank, world, micro_batch), len(ours)))
        for step in range(num_steps):
            of_step = ours[step * for_rank : (step + 1) * for_rank]
            begin = start + step * global_batch
            assert all((position - begin) % world == rank for position in of_step)
            assert {step_end(start, position, global_batch) for position in of_step} == {begin + global_batch}
        everything += ours
    assert sorted(everything) == list(range(start, start + num_steps * global_batch))


def test_an_empty_data_set_has_no_order() -> None:
    with pytest.raises(AssertionError):
        next(samples_at([0, 0], 0, range(1)))
