"""Process-wide settings of torch for GPUs: the memory allocator, and cuDNN's choice of algorithms."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import torch

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Environment variables of torch's CUDA allocator; torch takes the first that is set."""


def configure_allocator(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let the segments of torch's CUDA allocator grow, unless the user has configured the allocator.

    Segments of a fixed size cannot be reused for larger tensors. The parameters that ZeRO-3 gathers have
    other sizes in every block, so that fixed segments would fragment the memory. Call it before the first
    use of CUDA: torch reads the variables only then.
    """
    if not any(name in environ for name in ALLOCATOR_VARIABLES):
        environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def configure_gpu(
    device: torch.device,
    *,
    deterministic: bool,
    fixed_shapes: bool,
    environ: MutableMapping[str, str] = os.environ,
) -> None:
    """Set torch's process-wide switches for computing on `device`. On a CPU do nothing.

    Call it before the first product on the GPU.

    Args:
        deterministic: use only algorithms whose results are the same each time.
        fixed_shapes: all batches have one shape, so that it pays to time cuDNN's algorithms for it.
    """
    if device.type != "cuda":
        return
    # The fastest of several algorithms can be another one in the next process, with other last bits.
    torch.backends.cudnn.benchmark = fixed_shapes and not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
        # Otherwise every torch.empty is filled with NaN, a pass over memory that no result needs.
        torch.utils.deterministic.fill_uninitialized_memory = not deterministic  # type: ignore[attr-defined]
    if deterministic:
        # cuBLAS reads it at its first call; torch refuses a product without it.
        environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
