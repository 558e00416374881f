"""By which rule two computations of a step differ, and which hosts are named for it."""

from __future__ import annotations

from math import inf, nan

import pytest

from svd_ds.training.fault_cause import FaultCause, Recomputation, differ, find_cause

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
        # A loss near zero, as a discriminator's term makes it, is measured by all of its rank's clips.
        ((1.0, 1e-6), (1.0, 3e-6), False),
        ((1.0, 1e-6), (1.0, 0.02), True),
        ((nan, 1.0), (nan, 1.5), True),
        ((0.0,), (0.0,), False),
        ((3e38, 3e38), (3e38, 3e38), False),
    ],
)
def test_two_computations_differ(first: tuple[float, ...], second: tuple[float, ...], expected: bool) -> None:
    assert differ(first, second, TOLERANCE) is expected


def ranks(*losses: tuple[tuple[float, ...], tuple[float, ...]], of_a_host: int = 1) -> list[Recomputation]:
    return [
        Recomputation(rank, f"node{rank // of_a_host}", (f"a{rank}", f"b{rank}"), pair)
        for rank, pair in enumerate(losses)
    ]


def test_the_same_again_is_the_datas_and_names_the_worst_clip() -> None:
    bad = ((nan, 0.7), (nan, 0.7))
    assert find_cause(ranks(SAME, bad), (inf, inf), TOLERANCE) == FaultCause(
        False, "computed again it comes out the same; no finite loss has a1 (rank 1 on node1)"
    )
    high = ((0.5, 80.0), (0.5, 80.001))
    assert find_cause(ranks(SAME, high), (9.0, 9.01), TOLERANCE) == FaultCause(
        False, "computed again it comes out the same; the highest loss, 80, is that of b1 (rank 1 on node1)"
    )
    every = find_cause(ranks(*[((nan, nan), (nan, nan))] * 4), (inf, inf), TOLERANCE)
    assert "no finite loss has a0 (rank 0 on node0), b0 (rank 0 on node0), a1 " in every.message
    assert every.message.endswith(", a2 (rank 2 on node2) and 3 more")


def test_a_wrong_loss_names_its_rank_and_host() -> None:
    cause = find_cause(ranks(SAME, WRONG), (inf, 0.8), TOLERANCE)
    assert cause.hardware
    assert cause.message == "rank 1 on node1 computed a loss of nan, then 0.6, from the same clips"
    assert cause.nodes == {"node1": "computed a loss of nan, then 0.6, from the same clips (rank 1)"}


def test_all_wrong_ranks_of_a_host_are_told() -> None:
    cause = find_cause(ranks(SAME, SAME, WRONG, WRONG, of_a_host=2), (inf, 0.8), TOLERANCE)
    assert list(cause.nodes) == ["node1"]
    assert "(rank 2), and computed" in cause.nodes["node1"] and "(rank 3)" in cause.nodes["node1"]


def test_no_host_is_named_where_all_of_several_are_wrong() -> None:
    cause = find_cause(ranks(WRONG, WRONG), (inf, 0.8), TOLERANCE)
    assert cause.hardware and cause.nodes == {}
    assert cause.message.endswith("no node can be told from the others")
    alone = find_cause(ranks(WRONG, WRONG, of_a_host=2), (inf, 0.8), TOLERANCE)
    assert list(alone.nodes) == ["node0"], "there is no other"


def test_a_wrong_gradient_names_its_rank_where_each_keeps_its_own() -> None:
    unknown = find_cause(ranks(SAME, SAME), (inf, 0.8), TOLERANCE)
    assert unknown.hardware and unknown.nodes == {}
    assert "its gradient has norm 0.8" in unknown.message
    alone = find_cause(ranks(SAME, SAME, of_a_host=2), (inf, 0.8), TOLERANCE)
    assert alone.nodes == {"node0": "computed a gradient of norm inf, then 0.8"}
    kept = [
        Recomputation(rank, f"node{rank}", ("a", "b"), SAME, (nan, 0.7) if rank else (0.6, 0.601))
        for rank in range(3)
    ]
    kept[2] = Recomputation(2, "node2", ("a", "b"), SAME, (0.5, 0.5))
    cause = find_cause(kept, (inf, 0.8), TOLERANCE)
    assert cause.nodes == {"node1": "computed a gradient of norm nan, then 0.7, from the same clips (rank 1)"}
