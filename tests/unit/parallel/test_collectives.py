"""Shared errors on one rank; tests/distributed has several."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from svd_ds.cli import is_retryable
from svd_ds.parallel.collectives import SharedError, broadcast_from_rank0, raise_on_all_ranks


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("share", [raise_on_all_ranks, broadcast_from_rank0])
@pytest.mark.parametrize(
    ("error", "retryable"),
    [
        (OSError(errno.ENOSPC, "no space left"), True),
        (OSError(errno.ESTALE, "stale file handle"), True),
        (FileNotFoundError("nowhere"), False),
        (PermissionError("not yours"), False),
        (ValueError("it must be at least 1"), False),
    ],
)
def test_error_that_is_retryable_on_one_rank_is_retryable_on_all(
    share: object, error: Exception, retryable: bool
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SharedError) as shared:
        share(fail)  # type: ignore[operator]
    assert str(shared.value) == str(error)
    assert is_retryable(shared.value) is retryable
