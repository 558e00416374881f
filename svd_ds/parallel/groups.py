"""Parallel dimensions, and their process groups in the rank layout of megatron-core.

Only groups that are used are created, and a rank creates only its own. megatron-core's
initialize_model_parallel creates all groups that its features may need: 710 at 64 ranks, 17 of which contain
a given rank, and with gloo each opens a connection to each of its ranks.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from svd_ds.parallel.env import DEFAULT_TIMEOUT

ORDER = "tp-cp-ep-dp-pp"
"""Order of the dimensions, from the one whose ranks are next to each other; megatron-core's default."""
DATA, MODEL = "dp", "tp-pp"
"""Dimensions of the data-parallel and of the model-parallel groups, by megatron-core's names."""


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of parallelism; their product is the number of ranks."""

    world: int
    """Number of ranks."""

    def __post_init__(self) -> None:
        if self.world < 1:
            raise ValueError(f"the number of ranks is {self.world}: it must be at least 1")


class ModelParallelUnit:
    """DeepSpeed's `mpu` interface over the process groups of this rank.

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
    """Create the process groups of this rank. All ranks call it, after torch.distributed is initialised.

    Args:
        timeout: limit of every collective of a group that does not contain all ranks.
    """
    assert dims.world == dist.get_world_size(), f"{dims.world} ranks planned, {dist.get_world_size()} present"
    with warnings.catch_warnings():
        # megatron-core warns four times that Transformer Engine and Apex are absent: neither is used here.
        warnings.simplefilter("ignore", UserWarning)
        from megatron.core.parallel_state import RankGenerator
    layout = RankGenerator(tp=1, ep=1, dp=dims.world, pp=1, cp=1, order=ORDER)
    return ModelParallelUnit(
        data=_own_group(layout.get_ranks(DATA), timeout), model=_own_group(layout.get_ranks(MODEL), timeout)
    )


def _own_group(layout: list[list[int]], timeout: timedelta) -> ProcessGroup:
    """Return the process group of this rank.

    Args:
        layout: ranks of each group; every rank is in exactly one.
    """
    ranks = next(ranks for ranks in layout if dist.get_rank() in ranks)
    if len(ranks) == dist.get_world_size():
        world = dist.group.WORLD
        assert world is not None
        return world
    # Synchronised among its members alone: the other ranks need not take part in its creation.
    return dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
