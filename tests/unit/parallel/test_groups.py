from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from svd_ds.parallel import env as environment
from svd_ds.parallel.env import Env
from svd_ds.parallel.groups import ParallelDims, create_groups, destroy_groups


def test_all_ranks_are_data_parallel() -> None:
    assert ParallelDims(world=6).data == 6


def test_no_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="0 ranks"):
        ParallelDims(world=0)


def test_every_group_waits_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[timedelta] = []
    new_group = dist.new_group

    def noted(*given: Any, **named: Any) -> Any:
        waits.append(named["timeout"])
        return new_group(*given, **named)

    monkeypatch.setattr(dist, "new_group", noted)
    environment.init(Env.read({}))
    try:
        create_groups(ParallelDims(1), timedelta(minutes=99.5))
        destroy_groups()
    finally:
        environment.shutdown()
    assert set(waits) == {timedelta(minutes=100)}
