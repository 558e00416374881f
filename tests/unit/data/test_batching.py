"""Division of the global batch into micro-batches."""

from __future__ import annotations

import pytest

from svd_ds.data.batching import BatchConfig, BatchSplit, divisors


def test_null_micro_batch_is_the_share_of_a_rank() -> None:
    assert BatchConfig(12).split(3) == BatchSplit(size=12, world=3, micro=(4,))
    assert BatchConfig(12).split(3).num_micro_batches(0) == 1


def test_buckets_have_their_own_micro_batches() -> None:
    split = BatchConfig(24, micro=3).split(2, {"1x8x8": 12, "4x8x8": 4})
    assert split.micro == (12, 4)
    assert [split.num_micro_batches(bucket) for bucket in (0, 1)] == [1, 3]


@pytest.mark.parametrize(
    ("batch", "world", "buckets", "message"),
    [
        (BatchConfig(12), 5, {}, r"batch.size 12 cannot be split over 5 ranks; start 4 or 6"),
        (BatchConfig(12, 2), 4, {}, r"batch.micro 2 does not divide the 3 clips .* 4 ranks .* choose 1 or 3"),
        (BatchConfig(12), 2, {"4x8x8": 4}, r"data.buckets.4x8x8 4 does not divide the 6 clips .* 3 or 6"),
        (BatchConfig(2), 4, {}, r"batch.size 2 cannot be split over 4 ranks; start 2"),
    ],
)
def test_indivisible_sizes_are_refused_with_the_nearest_divisors(
    batch: BatchConfig, world: int, buckets: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        batch.split(world, buckets)


def test_auto_must_be_resolved_before_the_batch_is_divided() -> None:
    batch = BatchConfig(12, "auto")
    assert batch.share(3) == 4
    with pytest.raises(AssertionError, match="resolved before"):
        batch.split(3)
    assert batch.split(3, {"1x8x8": 2}).micro == (2,), "buckets have their own"


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12] and divisors(1) == [1]
