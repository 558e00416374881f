"""Comparison of two computations of a step, and the hosts that it names."""

from __future__ import annotations

from math import inf, nan

import pytest

from svd_ds.training.fault_cause import FaultCause, Recomputation, find_cause, is_different

TOLERANCE = 0.01
SAME = ((0.5, 0.7), (0.5, 0.7))
WRONG = ((0.5, nan), (0.5, 0.7))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0.5,), (0.5,), False),
        ((nan,), (nan,), False),
        ((nan,), (inf,), False),  # out of bounds both times: which one it is depends on the order of sums
        ((nan,), (0.5,), True),
        ((0.5,), (inf,), True),
        ((0.5, nan), (nan, 0.5), True),
        ((1.0,), (1.0099,), False),
        ((1.0,), (1.0102,), True),
        ((1.0102,), (1.0,), True),
        ((-1.0,), (-1.0102,), True),
        # A loss near zero (by an adversarial term) is compared to the losses of all clips of its rank.
        ((1.0, 1e-6), (1.0, 3e-6), False),
        ((1.0, 1e-6), (1.0, 0.02), True),
        ((nan, 1.0), (nan, 1.5), True),
        ((0.0,), (0.0,), False),
        ((3e38, 3e38), (3e38, 3e38), False),
    ],
)
def test_numbers_are_different_beyond_the_tolerance(
    first: tuple[float, ...], second: tuple[float, ...], expected: bool
) -> None:
    assert is_different(first, second, TOLERANCE) is expected


def ranks(
    *losses: tuple[tuple[float, ...], tuple[float, ...]], ranks_per_host: int = 1
) -> list[Recomputation]:
    return [
        Recomputation(rank, f"node{rank // ranks_per_host}", (f"a{rank}", f"b{rank}"), pair)
        for rank, pair in enumerate(losses)
    ]


def test_same_numbers_mean_bad_data_and_name_the_worst_clip() -> None:
    bad = ((nan, 0.7), (nan, 0.7))
    assert find_cause(ranks(SAME, bad), (inf, inf), TOLERANCE) == FaultCause(
        False, "computing it again gives the same numbers; the loss is not finite for a1 (rank 1 on node1)"
    )
    high = ((0.5, 80.0), (0.5, 80.001))
    assert find_cause(ranks(SAME, high), (9.0, 9.01), TOLERANCE) == FaultCause(
        False, "computing it again gives the same numbers; the highest loss is 80, of b1 (rank 1 on node1)"
    )
    every = find_cause(ranks(*[((nan, nan), (nan, nan))] * 4), (inf, inf), TOLERANCE)
    assert "the loss is not finite for a0 (rank 0 on node0), b0 (rank 0 on node0), a1 " in every.message
    assert every.message.endswith(", a2 (rank 2 on node2) and 3 more")


def test_wrong_loss_names_its_rank_and_host() -> None:
    cause = find_cause(ranks(SAME, WRONG), (inf, 0.8), TOLERANCE)
    assert cause.hardware
    assert cause.message == "rank 1 on node1 computed a loss of nan, then 0.6, from the same clips"
    assert cause.nodes == {"node1": "computed a loss of nan, then 0.6, from the same clips (rank 1)"}


def test_all_wrong_ranks_of_a_host_are_named() -> None:
    cause = find_cause(ranks(SAME, SAME, WRONG, WRONG, ranks_per_host=2), (inf, 0.8), TOLERANCE)
    assert list(cause.nodes) == ["node1"]
    assert "(rank 2), and computed" in cause.nodes["node1"] and "(rank 3)" in cause.nodes["node1"]


def test_no_host_is_named_if_all_of_several_are_wrong() -> None:
    cause = find_cause(ranks(WRONG, WRONG), (inf, 0.8), TOLERANCE)
    assert cause.hardware and cause.nodes == {}
    assert cause.message.endswith("the failing node cannot be identified")
    alone = find_cause(ranks(WRONG, WRONG, ranks_per_host=2), (inf, 0.8), TOLERANCE)
    assert list(alone.nodes) == ["node0"], "there is no other host"


def test_wrong_gradient_names_its_rank_if_each_rank_records_its_norm() -> None:
    unknown = find_cause(ranks(SAME, SAME), (inf, 0.8), TOLERANCE)
    assert unknown.hardware and unknown.nodes == {}
    assert "a gradient norm of 0.8 and the same loss" in unknown.message
    alone = find_cause(ranks(SAME, SAME, ranks_per_host=2), (inf, 0.8), TOLERANCE)
    assert alone.nodes == {"node0": "computed a gradient of norm inf, then 0.8"}
    kept = [
        Recomputation(rank, f"node{rank}", ("a", "b"), SAME, (nan, 0.7) if rank else (0.6, 0.601))
        for rank in range(3)
    ]
    kept[2] = Recomputation(2, "node2", ("a", "b"), SAME, (0.5, 0.5))
    cause = find_cause(kept, (inf, 0.8), TOLERANCE)
    assert cause.nodes == {"node1": "computed a gradient of norm nan, then 0.7, from the same clips (rank 1)"}
