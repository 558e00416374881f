"""How the ranks divide the work, and the process groups that follow: megatron-core's."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from svd_ds.parallel.env import WAIT


@dataclass(frozen=True)
class ParallelDims:
    """The degrees of parallelism; their product is the number of ranks."""

    world: int

    def __post_init__(self) -> None:
        if self.world < 1:
            raise ValueError(f"a run of {self.world} ranks is not possible: it needs at least 1")


class ModelParallelUnit:
    """What DeepSpeed asks of its `mpu`, answered by megatron-core's parallel_state.

    parallel_state itself will not do: it has no get_model_parallel_world_size and no get_model_parallel_rank.
    """

    def __init__(self, data: ProcessGroup, model: ProcessGroup) -> None:
        self._data = data
        self._model = model

    def get_data_parallel_group(self) -> ProcessGroup:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data)

    def get_model_parallel_group(self) -> ProcessGroup:
        return self._model

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._model)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._model)


def create_groups(dims: ParallelDims, timeout: timedelta = WAIT) -> ModelParallelUnit:
    """Create the process groups of `dims`. All ranks call it, once, after torch.distributed is up. `timeout`
    bounds every wait for another rank, to the minute."""
    assert dims.world == dist.get_world_size(), f"{dims.world} ranks planned, {dist.get_world_size()} present"
    with warnings.catch_warnings():
        # It tells us four times that Transformer Engine and Apex are absent: neither is used here.
        warnings.simplefilter("ignore", UserWarning)
        from megatron.core import parallel_state
    parallel_state.initialize_model_parallel(
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(timeout / timedelta(minutes=1)),
    )
    return ModelParallelUnit(
        data=parallel_state.get_data_parallel_group(), model=parallel_state.get_model_parallel_group()
    )


def destroy_groups() -> None:
    """Forget the process groups, before torch.distributed ends."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
