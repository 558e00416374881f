"""Matrices of shards, against the definition of a shard."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from svd_ds.parallel.shard_copies import cut, join, own_shards, shard_size

NUM_RANKS = (1, 2, 3, 5, 8, 64, 384)
SHAPES = [
    [(7,)],
    [(1,), (1,)],
    [(64, 3), (5,)],
    [(5,), (320,), (1,), (3, 4, 5)],
    [(640,), (64, 64), (63,), (2,), (384, 2), (129, 3)],
]


def tensors_of(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def row_of(tensors: list[Tensor], rank: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Shards of a rank by definition, with zeros for padding, and where they are not padding."""
    shards, kept = [], []
    for tensor in tensors:
        n = shard_size(tensor.numel(), num_ranks)
        shard = tensor.reshape(-1)[rank * n : (rank + 1) * n]
        shards.append(F.pad(shard, (0, n - shard.numel())))
        kept.append(torch.arange(n) < shard.numel())
    return torch.cat(shards), torch.cat(kept)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_rows_are_the_shards_of_the_ranks(num_ranks: int, shapes: list[tuple[int, ...]]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = tensors_of(shapes, dtype)
        matrix = cut(tensors, num_ranks, torch.float32)
        assert matrix.dtype == torch.float32
        for rank in range(num_ranks):
            row, kept = row_of(tensors, rank, num_ranks)
            assert torch.equal(matrix[rank][kept], row[kept].float())
            own = own_shards(matrix[rank], [tensor.numel() for tensor in tensors], rank, num_ranks)
            assert torch.equal(torch.cat(own), row[kept].float())


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_joined_tensors_are_those_that_were_cut(num_ranks: int, shapes: list[tuple[int, ...]]) -> None:
    tensors = tensors_of(shapes)
    joined = join(cut(tensors, num_ranks, torch.float32), [tensor.shape for tensor in tensors])
    assert all(torch.equal(x, y) and x.shape == y.shape for x, y in zip(joined, tensors, strict=True))
    assert all(tensor.is_contiguous() for tensor in joined)


def test_gradients_are_rounded_to_the_data_type_of_the_sum() -> None:
    tensors = tensors_of([(10,), (33,)])
    matrix = cut(tensors, 4, torch.bfloat16)
    joined = join(matrix, [tensor.shape for tensor in tensors])
    assert all(torch.equal(x, y.bfloat16()) for x, y in zip(joined, tensors, strict=True))


def test_single_tensor_is_copied_only_where_it_must_be() -> None:
    (tensor,) = tensors_of([(6, 4)])
    assert cut([tensor], 3, torch.float32).data_ptr() == tensor.data_ptr()
    assert cut([tensor], 3, torch.bfloat16).data_ptr() != tensor.data_ptr()
    assert cut([tensor], 5, torch.float32).data_ptr() != tensor.data_ptr()
