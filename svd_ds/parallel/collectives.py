"""Collectives outside the engine: reductions, gathers, and errors that all ranks raise together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from svd_ds.cli import USER_ERRORS, is_retryable

Result = TypeVar("Result")


class SharedError(ValueError):
    """A user's mistake that every rank knows, so that one of them can report it for all."""


class RetryableSharedError(SharedError, OSError):
    """A shared error after which a retry may succeed, such as a full disk (svd_ds.cli.is_retryable)."""


def is_peer_failure(error: BaseException) -> bool:
    """True if `error` only says that another rank has ended; that rank reports why."""
    # gloo raises plain RuntimeErrors, which name its own source files; nccl raises DistErrors.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def all_reduce_mean(values: list[float]) -> list[float]:
    """Return the mean of each number over all ranks. All ranks call it."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def all_reduce_max(value: int) -> int:
    """Return the highest value over all ranks. All ranks call it."""
    highest = torch.tensor(value)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return int(highest)


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, in one message. All ranks call it."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def all_gather_cat(part: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks, all of one shape, along the first axis. All ranks call it."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def gather_rows_to_rank0(part: Tensor, counts: Sequence[int]) -> Tensor | None:
    """Concatenate the first rows of the tensors of all ranks, on rank 0 only. All ranks call it.

    No other rank receives anything, and a rank without rows sends nothing.

    Args:
        part: tensor in host memory, whose rows have the same shape on all ranks.
        counts: number of rows that each rank contributes.

    Returns:
        All rows in rank order; None on ranks above 0.
    """
    own = part[: counts[dist.get_rank()]]
    if dist.get_rank() != 0:
        if len(own):
            dist.send(own.contiguous(), dst=0)
        return None
    rows = part.new_empty(sum(counts), *part.shape[1:])
    for rank, received in enumerate(rows.split(list(counts))):
        if rank == 0:
            received.copy_(own)
        elif len(received):
            dist.recv(received, src=rank)
    return rows


def all_gather_objects(items: list[Result]) -> list[Result]:
    """Return the items of all ranks in rank order. All ranks call it."""
    lists: list[list[Result]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def broadcast_from_rank0(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 only, and return its result on every rank.

    All ranks call it.

    Raises:
        SharedError: on all ranks; the action raised ValueError or OSError.
    """
    found = [raise_on_all_ranks(action) if dist.get_rank() == 0 else raise_on_all_ranks(lambda: None)]
    dist.broadcast_object_list(found)
    return cast(Result, found[0])


def raise_on_all_ranks(action: Callable[[], Result]) -> Result:
    """Run on every rank an action that may fail on some, such as reading files. All ranks call it.

    Args:
        action: must not contain a collective.

    Raises:
        SharedError: on every rank, so that no rank waits for a failed one; the message is that of the first
            rank that failed.
        RetryableSharedError: likewise, if the error of that rank is retryable.
    """
    failure, result = None, None
    try:
        result = action()
    except USER_ERRORS as error:
        failure = RetryableSharedError if is_retryable(error) else SharedError, str(error)
    failures: list[tuple[type[SharedError], str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for first in failures:
        if first is not None:
            kind, sentence = first
            raise kind(sentence)
    return cast(Result, result)
