"""Global norm of a gradient in partitions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from svd_ds.parallel.gradient_norm import combined_norm, global_norm
from tests.host_reads import HostReads


@pytest.fixture
def group() -> Iterator[ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_norm_of_partitions_is_that_of_their_concatenation(group: ProcessGroup) -> None:
    partitions = [torch.randn(size) for size in (1, 7, 1000)]
    norm = global_norm(partitions, group)
    assert norm.shape == () and norm.dtype == torch.float64
    assert math.isclose(norm.item(), torch.cat(partitions).double().norm().item(), rel_tol=1e-12)


def test_combined_norm_is_infinite_where_a_norm_is_not_finite_and_reads_nothing() -> None:
    def combined(*norms: float) -> Tensor:
        tensors = [torch.tensor(norm, dtype=torch.float64) for norm in norms]
        with HostReads() as reads:
            found = combined_norm(tensors, 0.5)
        assert reads.places == []
        return found

    assert combined(3.0, 4.0).item() == 2.5
    assert combined(3.0).item() == 1.5
    assert combined(3.0, math.nan).item() == math.inf
    assert combined(math.inf, 4.0).item() == math.inf


def test_reads_and_constants_of_the_host_are_noted() -> None:
    x = torch.ones(())
    with HostReads() as reads:
        x.item(), bool(x), torch.tensor(1.0), x + 1
    assert reads.places == ["test_gradient_norm.py:test_reads_and_constants_of_the_host_are_noted"] * 3
