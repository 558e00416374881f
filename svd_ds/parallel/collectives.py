"""The few things that ranks tell each other outside the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from svd_ds.cli import USER_ERRORS, is_retryable

Result = TypeVar("Result")


class SharedError(ValueError):
    """A user's mistake that every rank knows of, so that one of them can tell it for all."""


class RetryableSharedError(SharedError, OSError):
    """No mistake, but the outside world's fault: svd_ds.cli.is_retryable."""


def is_peer_failure(error: BaseException) -> bool:
    """Whether `error` only says that another rank has gone: that rank tells why."""
    # gloo raises plain RuntimeErrors, which name its own source files; nccl raises DistErrors.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def all_reduce_mean(values: list[float]) -> list[float]:
    """The mean of each number over all ranks. All ranks call it."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def all_reduce_max(value: int) -> int:
    """The highest of the ranks' numbers. All ranks call it."""
    highest = torch.tensor(value)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return int(highest)


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Put the sum over all ranks in place of each tensor, in one message. All ranks call it."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def all_gather_cat(part: Tensor) -> Tensor:
    """Every rank's tensor of one shape, joined along the first axis in order of rank. All ranks call it."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def all_gather_objects(items: list[Result]) -> list[Result]:
    """Every rank's items, in order of rank. All ranks call it."""
    lists: list[list[Result]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def broadcast_from_rank0(action: Callable[[], Result]) -> Result:
    """What `action` gives on rank 0, for every rank: each of them might find something else.

    All ranks call it. Raises SharedError on all where the action raises ValueError or OSError.
    """
    found = [raise_on_all_ranks(action) if dist.get_rank() == 0 else raise_on_all_ranks(lambda: None)]
    dist.broadcast_object_list(found)
    return cast(Result, found[0])


def raise_on_all_ranks(action: Callable[[], Result]) -> Result:
    """Do what may fail on some ranks alone, such as reading files. All ranks call it; `action` must not wait
    for one.

    Raises SharedError on every rank, with the sentence of the first rank that failed, so that none waits for
    it; RetryableSharedError where that rank's error may pass.
    """
    failure, result = None, None
    try:
        result = action()
    except USER_ERRORS as error:
        failure = RetryableSharedError if is_retryable(error) else SharedError, str(error)
    failures: list[tuple[type[SharedError], str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for told in failures:
        if told is not None:
            kind, sentence = told
            raise kind(sentence)
    return cast(Result, result)
