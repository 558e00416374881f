"""Counts the places where a program reads a number from a tensor, which on a GPU waits for the device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
)
CONSTANTS = (torch.ops.aten.lift_fresh.default,)
"""`torch.tensor(number, device=...)`, which on a GPU is a copy from the host that waits for the device."""


class HostReads(TorchDispatchMode):
    """Context that notes host reads, and copies of constants from the host, of its thread."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        """`file.py:function` of each, in order; the innermost frame outside of torch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS or func in CONSTANTS or _has_mask(func, args):
            self.places.append(_place())
        return func(*args, **(kwargs or {}))


def _has_mask(func: Any, args: Any) -> bool:
    """True for x[mask] and x[mask] = y, which read the number of elements of the mask."""
    if func.overloadpacket not in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])


def _place() -> str:
    frame = sys._getframe(2)
    while frame.f_back is not None and _is_torch(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"


def _is_torch(file: str) -> bool:
    return Path(torch.__file__).parent in Path(file).parents
