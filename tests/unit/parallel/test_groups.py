"""Process groups of a run, on one rank and on one of many."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from svd_ds.parallel import env as environment
from svd_ds.parallel.env import Env
from svd_ds.parallel.groups import ParallelDims, create_groups


@pytest.fixture
def one_rank() -> Iterator[None]:
    environment.init(Env.read({}))
    yield
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


@pytest.fixture
def num_ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """Number of ranks of a run whose rank 3 is this process; torch's fake backend stands for the others."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=request.param)
    yield request.param
    environment.shutdown()


@pytest.mark.parametrize("num_ranks", [8, 64, 384], indirect=True)
def test_rank_creates_one_group_however_many_ranks_there_are(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    created: list[list[int]] = []
    new_group = dist.new_group

    def noted(ranks: list[int], **options: Any) -> Any:
        created.append(ranks)
        return new_group(ranks, **options)

    monkeypatch.setattr(dist, "new_group", noted)
    mpu = create_groups(ParallelDims(num_ranks))
    assert created == [[3]]
    assert len(dist.distributed_c10d._world.pg_map) == 2, "its own, and that of all ranks"
    assert mpu.get_data_parallel_group() is dist.group.WORLD
    assert (mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()) == (3, num_ranks)
    assert (mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()) == (0, 1)


@pytest.mark.parametrize("num_ranks", [8], indirect=True)
def test_groups_are_those_of_megatron_core(num_ranks: int) -> None:
    mpu = create_groups(ParallelDims(num_ranks))
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    for ours, theirs in (
        (mpu.get_data_parallel_group(), parallel_state.get_data_parallel_group()),
        (mpu.get_model_parallel_group(), parallel_state.get_model_parallel_group()),
    ):
        assert dist.get_process_group_ranks(ours) == dist.get_process_group_ranks(theirs)
    parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("num_ranks", [8], indirect=True)
def test_group_of_some_ranks_has_the_timeout_of_the_run(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    waits: list[timedelta] = []
    monkeypatch.setattr(dist, "new_group", lambda ranks, timeout, **_: waits.append(timeout))
    create_groups(ParallelDims(num_ranks), timedelta(minutes=99.5))
    assert waits == [timedelta(minutes=99.5)]
