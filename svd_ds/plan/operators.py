"""Operators of torch as the tracker sees them, and the tensors in their arguments."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

_COPIES = ("aten::_to_copy", "aten::copy_", "aten::_foreach_copy_", "aten::copy")
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index")
_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")
_ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")
CALLERS = 3
"""Callers that a location names."""
_PACKAGE = f"{Path(__file__).resolve().parents[1]}{os.sep}"
_OWN = f"{Path(__file__).resolve().parent}{os.sep}"


class Op(NamedTuple):
    """Properties of an operator that the tracker uses."""

    name: str
    kind: str
    flops: Any
    is_view: bool
    is_copy: bool
    takes_host_indices: bool
    reads: bool
    allocates: bool
    is_mutable: bool


def locate() -> str:
    """Return file:line of the innermost frames in svd_ds, "FIRST (from SECOND, THIRD)"; else of any frame."""
    frame: Any = sys._getframe(1)
    found: list[str] = []
    fallback = "the backward pass"
    while frame is not None and len(found) <= CALLERS:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE) and not name.startswith(_OWN):
            found.append(f"svd_ds/{name.removeprefix(_PACKAGE)}:{frame.f_lineno}")
        elif fallback == "the backward pass" and "/torch/" not in name and not name.startswith(_OWN):
            fallback = f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    first, *callers = found or [fallback]
    return f"{first} (from {', '.join(callers)})" if callers else first


def describe(func: Any) -> Op:
    """Return the properties of an operator, an OpOverload."""
    name = func.name().partition(".")[0]
    packet = func._overloadpacket
    flops = flop_registry.get(packet)
    kind = "rest"
    if flops is not None:
        kind = "conv" if "convolution" in name else "attention" if "attention" in name else "matmul"
    return Op(
        name, kind, flops, bool(func.is_view), name in _COPIES, name in _INDEXING, name in _READS,
        name in _ALLOCATIONS, func._schema.is_mutable
    )  # fmt: skip


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments of an operator, which may be lists and dicts."""
    for value in values.values() if type(values) is dict else values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (list, tuple, dict):
            yield from tensors_in(value)


def replace_tensors(values: Any, replaced: dict[int, Tensor]) -> Any:
    """Return `values` with the tensors whose id is in `replaced` replaced."""
    if isinstance(values, Tensor):
        return replaced.get(id(values), values)
    if type(values) in (list, tuple):
        return type(values)(replace_tensors(value, replaced) for value in values)
    if type(values) is dict:
        return {name: replace_tensors(value, replaced) for name, value in values.items()}
    return values


def stand_in_number(tensor: Tensor) -> Any:
    """Return a number of the tensor's type, in place of one that a fake tensor does not have."""
    return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


def stand_in_result(name: str, tensor: Tensor) -> Any:
    """Return a result for an operator that reads values: one number, one index, or one element."""
    if name == "aten::_local_scalar_dense":
        return stand_in_number(tensor)
    if name == "aten::nonzero":
        return tensor.new_zeros(1, tensor.dim(), dtype=torch.long)
    return True if name == "aten::equal" else tensor.new_zeros(1)


def onednn_scratch(inputs: Sequence[Tensor], results: Sequence[Tensor]) -> int:
    """Return the bytes that a convolution on a CPU allocates besides its results, and frees before them.

    oneDNN copies operands with channels first into a layout of its own, and the result out of it. GPUs have
    workspaces, too, which only they know.
    """
    if (
        inputs[0].is_cuda
        or inputs[0].dim() != 4
        or inputs[0].is_contiguous(memory_format=torch.channels_last)
    ):
        return 0
    copied, made = (sum(t.numel() * t.element_size() for t in group) for group in (inputs[:2], results))
    return max(copied + made, 2 * made)
