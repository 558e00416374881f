"""Process groups of a run, on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from svd_ds.parallel import env as environment
from svd_ds.parallel.env import Env
from svd_ds.parallel.groups import ParallelDims, create_groups, destroy_groups


@pytest.fixture
def one_rank() -> Iterator[None]:
    environment.init(Env.read({}))
    yield
    destroy_groups()
    environment.shutdown()


def test_number_of_ranks_must_be_positive() -> None:
    with pytest.raises(ValueError, match="number of ranks is 0: it must be at least 1"):
        ParallelDims(world=0)


@pytest.mark.usefixtures("one_rank")
def test_all_ranks_are_data_parallel_and_each_is_a_model_of_its_own() -> None:
    mpu = create_groups(ParallelDims(1))
    assert (mpu.get_data_parallel_world_size(), mpu.get_model_parallel_world_size()) == (1, 1)
    assert dist.get_process_group_ranks(mpu.get_data_parallel_group()) == [0]
    assert dist.get_process_group_ranks(mpu.get_model_parallel_group()) == [0]


@pytest.mark.usefixtures("one_rank")
def test_plan_for_another_number_of_ranks_is_refused() -> None:
    with pytest.raises(AssertionError, match="2 ranks planned, 1 present"):
        create_groups(ParallelDims(2))


@pytest.mark.usefixtures("one_rank")
def test_timeout_of_every_group_is_rounded_up_to_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[timedelta] = []
    new_group = dist.new_group

    def noted(*given: Any, **named: Any) -> Any:
        waits.append(named["timeout"])
        return new_group(*given, **named)

    monkeypatch.setattr(dist, "new_group", noted)
    create_groups(ParallelDims(1), timedelta(minutes=99.5))
    assert set(waits) == {timedelta(minutes=100)}
