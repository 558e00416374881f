"""Memory that runs out before the first step of a restart is complete: a mistake of the user, or of the node.

The same command would run out of memory again, unless other processes hold a part of the GPU's memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from svd_ds.parallel.env import host

GIB = 2**30
OWN_GIB = 4.0
"""Memory in GiB that this process may hold outside of torch's allocator: CUDA's context, NCCL's buffers. An
estimate, not measured."""
LEAST_MEMORY: Mapping[str, object] = {
    "batch.micro": 1,
    "recompute": "full",
    "frozen.chunk": 1,
    "parallel.offload_optimizer": True,
    "checkpoint.asynchronous": False,
}
"""Setting -> value that takes the least memory; the first ones cost the least time."""
ON_GPU = ("batch.micro", "recompute", "frozen.chunk", "parallel.offload_optimizer")
ON_HOST = ("batch.micro", "recompute", "frozen.chunk", "checkpoint.asynchronous")
HOST_SIGN = "DefaultCPUAllocator: can't allocate memory"
LIBRARY_SIGNS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
NCCL_SIGN = re.compile(r"Cuda failure.*'out of memory'")


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if torch, cuBLAS, cuDNN or NCCL could not allocate memory of this rank's GPU, or torch no
    memory of the host."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    signs = any(sign in text for sign in (HOST_SIGN, *LIBRARY_SIGNS)) or NCCL_SIGN.search(text) is not None
    return isinstance(error, RuntimeError) and signs


def explain_out_of_memory(
    error: BaseException, device: torch.device, settings: Mapping[str, object]
) -> ValueError | OSError | None:
    """Explain an error of memory before the first step is complete; None for another error.

    Args:
        device: device of this rank.
        settings: values of the keys of LEAST_MEMORY; those that are missing are not named.

    Returns:
        A ValueError that names the settings that take less memory; an OSError, which is retryable, if other
        processes hold a notable part of the GPU's memory.
    """
    if not is_out_of_memory(error):
        return None
    text = str(error)
    on_host = HOST_SIGN in text
    what = "out of host memory" if on_host else "out of GPU memory"
    foreign, total = (0.0, None) if on_host else _memory_gib(device)
    if foreign > OWN_GIB:
        return OSError(
            f"{what} on {host()} before the first step is complete: other processes hold "
            f"{foreign:.1f} of the {total:.1f} GiB of {device}"
        )
    asked = _asked(text)
    capacity = _capacity(text) or (f"{total:.2f} GiB" if total is not None else None)
    need = f"{asked} more" if asked else "the buffers of a library"
    place = "this machine" if on_host else f"the {capacity} of {device}" if capacity else str(device)
    return ValueError(
        f"{what} before the first step is complete: {need} do not fit into {place}; "
        f"{_savers(settings, ON_HOST if on_host else ON_GPU)} need less"
    )


def _memory_gib(device: torch.device) -> tuple[float, float | None]:
    """Return what other processes hold of a GPU's memory, including what this one holds outside of torch's
    allocator, and the memory of the GPU, in GiB; (0, None) if it cannot be read."""
    if device.type != "cuda":
        return 0.0, None
    try:
        free, total = torch.cuda.mem_get_info(device)
        return (total - free - torch.cuda.memory_reserved(device)) / GIB, total / GIB
    except RuntimeError:
        return 0.0, None


def _asked(text: str) -> str | None:
    """Size of the allocation that failed, in the words of torch's allocators: 20.00 GiB."""
    if (found := re.search(r"you tried to allocate (\d+) bytes", text)) is not None:
        return f"{int(found[1]) / GIB:.2f} GiB"
    found = re.search(r"Tried to allocate ([\d.]+ \w+)\.", text)
    return found[1] if found is not None else None


def _capacity(text: str) -> str | None:
    found = re.search(r"total capacity of ([\d.]+ \w+)", text)
    return found[1] if found is not None else None


def _savers(settings: Mapping[str, object], keys: tuple[str, ...]) -> str:
    """List the settings that can take less memory: batch.micro=1 (now 4)."""
    found = [
        f"{key}={_yaml(LEAST_MEMORY[key])} (now {_yaml(settings[key])})"
        for key in keys
        if key in settings and settings[key] != LEAST_MEMORY[key]
    ]
    return ", ".join([*found, "or more ranks"]) if found else "only more ranks"


def _yaml(value: object) -> str:
    names = {None: "null", True: "true", False: "false"}
    return names[value] if value is None or isinstance(value, bool) else str(value)
