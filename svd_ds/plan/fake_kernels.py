"""Stand-ins for kernels that fake tensors cannot run: Triton's, and fused attention.

The wrappers of Triton's kernels and their autograd functions run as they are; a launch is counted by the
tracker, which checks the devices of its tensors. torch computes attention of fake tensors by its formula;
here it is sent to the fused operator that a GPU would take.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from svd_ds.model.ops import attention, fused
from svd_ds.plan.tracker import StepTracker

MAX_FLASH_WIDTH = 256
"""Largest head width of torch's flash attention."""
MAX_GRID = 2**31
"""Limit of a launch's first dimension."""
_tracker: StepTracker | None = None
_scaled_dot_product_attention = F.scaled_dot_product_attention


@contextmanager
def counted_by(tracker: StepTracker) -> Iterator[None]:
    """Have `tracker` count launches of kernels, and reads by `tolist`, inside the context."""
    global _tracker
    fake: Any = FakeTensor
    _tracker, read = tracker, fake.tolist
    # FakeTensor reads a list number by number, which would be a read each.
    fake.tolist = lambda tensor: tracker.read_list(tensor)
    try:
        yield
    finally:
        _tracker, fake.tolist = None, read


def replace_kernels() -> None:
    """Replace Triton's kernels and fused attention, for the rest of the process."""
    name = "svd_ds.model.ops.kernels"
    assert name not in sys.modules, "the real kernels are imported already"
    kernels = ModuleType(name)
    vars(kernels).update({"INTERPRETED": False, "__getattr__": _Kernel})
    sys.modules[name] = kernels
    users: Any = (attention, fused)
    for module in users:
        # A login node need not have Triton.
        module.triton_installed = lambda: True
    functional: Any = F
    functional.scaled_dot_product_attention = _attention
    cuda: Any = torch.cuda
    cuda.device_of = lambda tensor: nullcontext()


@contextmanager
def pretending_cuda() -> Iterator[None]:
    """Let fake CPU tensors say that they are on a GPU: without a C++ compiler there are no fake CUDA tensors.

    The project's choices of kernels are then a GPU's. Mixed devices cannot be seen.
    """
    kind: Any = FakeTensor
    kind.is_cuda, kind.is_cpu = property(lambda self: True), property(lambda self: False)
    try:
        yield
    finally:
        del kind.is_cuda, kind.is_cpu


class _Kernel:
    """Stand-in for the Triton kernel of a name."""

    def __init__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        self.name = name

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(isinstance(size, int) and 0 < size < MAX_GRID for size in grid), grid

        def launch(*args: Any, **options: Any) -> None:
            assert _tracker is not None
            _tracker.kernel(self.name, args)

        return launch


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Send attention to the kernel that torch takes on an A100 or H100."""
    if not q.is_cuda:
        return _scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    if attn_mask is None and is_half and q.shape[-1] <= MAX_FLASH_WIDTH:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    needs_sums = torch.is_grad_enabled() and q.requires_grad
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, attn_mask, needs_sums, dropout_p, is_causal, scale=scale)[0]
