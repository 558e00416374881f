from __future__ import annotations

import pytest

from svd_ds.parallel.groups import ParallelDims


def test_all_ranks_are_data_parallel() -> None:
    assert ParallelDims(world=6).data == 6


def test_no_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="0 ranks"):
        ParallelDims(world=0)
