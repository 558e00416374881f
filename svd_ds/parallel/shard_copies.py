"""Cutting tensors into shards and joining shards to tensors, with one strided copy a tensor.

The shards of several tensors form the rows of a matrix: row r holds, one behind the other, the shards of rank
r, elements [r * n, (r + 1) * n) of each flattened tensor, where n is ceil(numel / ranks). Such a matrix is
what a reduce-scatter takes and an all-gather gives. A tensor fills a block of columns, row by row, so one
copy moves it, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shard_size(numel: int, num_ranks: int) -> int:
    """Return the elements of a shard, padding included."""
    return -(-numel // num_ranks)


def cut(tensors: Sequence[Tensor], num_ranks: int, dtype: torch.dtype) -> Tensor:
    """Copy contiguous tensors into a matrix of shards, (ranks, elements of a rank); its padding is undefined.

    A single tensor that needs neither padding nor another data type is not copied, but viewed.
    """
    if len(tensors) == 1 and tensors[0].numel() % num_ranks == 0:
        return tensors[0].to(dtype).view(num_ranks, -1)
    sizes = [shard_size(tensor.numel(), num_ranks) for tensor in tensors]
    matrix = torch.empty(num_ranks, sum(sizes), dtype=dtype, device=tensors[0].device)
    targets, sources = [], []
    for tensor, size, columns in zip(tensors, sizes, matrix.split(sizes, dim=1), strict=True):
        numel = tensor.numel()
        if numel == num_ranks * size:
            targets.append(columns)
            sources.append(tensor.view(num_ranks, size))
            continue
        flat, full = tensor.view(-1), numel // size
        if full:
            targets.append(columns[:full])
            sources.append(flat[: full * size].view(full, size))
        if rest := numel - full * size:
            targets.append(columns[full, :rest])
            sources.append(flat[full * size :])
    # One call of the optimisers' copy of lists; it converts the data type as well.
    torch._foreach_copy_(targets, sources)
    return matrix


def own_shards(row: Tensor, numels: Sequence[int], rank: int, num_ranks: int) -> list[Tensor]:
    """Return views of a rank's row of the matrix: its shard of each tensor, without padding."""
    sizes = [shard_size(numel, num_ranks) for numel in numels]
    shards = row.split(sizes)
    return [
        shard if (kept := numel - rank * size) >= size else shard[: max(kept, 0)]
        for shard, size, numel in zip(shards, sizes, numels, strict=True)
    ]


def join(matrix: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Return the tensors of a matrix of shards, copied; the only tensor of a matrix is a view of it."""
    numels = [shape.numel() for shape in shapes]
    columns = matrix.split([shard_size(numel, len(matrix)) for numel in numels], dim=1)
    flat = [block.contiguous().view(-1) for block in columns]
    return [
        (x if x.numel() == numel else x[:numel]).view(shape)
        for x, numel, shape in zip(flat, numels, shapes, strict=True)
    ]
