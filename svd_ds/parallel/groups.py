"""Parallel dimensions, and their process groups, which megatron-core creates."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from svd_ds.parallel.env import DEFAULT_TIMEOUT


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of parallelism; their product is the number of ranks."""

    world: int
    """Number of ranks."""

    def __post_init__(self) -> None:
        if self.world < 1:
            raise ValueError(f"the number of ranks is {self.world}: it must be at least 1")


class ModelParallelUnit:
    """DeepSpeed's `mpu` interface over the process groups of megatron-core.

    megatron-core's parallel_state itself cannot be passed: it has no get_model_parallel_world_size and no
    get_model_parallel_rank.
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


def create_groups(dims: ParallelDims, timeout: timedelta = DEFAULT_TIMEOUT) -> ModelParallelUnit:
    """Create the process groups of `dims`. All ranks call it, once, after torch.distributed is initialised.

    Args:
        timeout: limit of every collective, rounded up to minutes.
    """
    assert dims.world == dist.get_world_size(), f"{dims.world} ranks planned, {dist.get_world_size()} present"
    with warnings.catch_warnings():
        # megatron-core warns four times that Transformer Engine and Apex are absent: neither is used here.
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
    """Destroy the process groups. Call it before torch.distributed is shut down."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
