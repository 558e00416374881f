"""Global norm of a gradient whose partitions lie on the ranks, computed without waiting for the device.

DeepSpeed's own functions read numbers on the host, or copy constants from there; both wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def gradient_norms(zero: Any, group: ProcessGroup) -> list[Tensor]:
    """Return the gradient's norm of each parameter group, bit for bit DeepSpeed's. All ranks call it.

    Args:
        zero: DeepSpeed's ZeRO-3 optimiser, after a backward pass.
    """
    return [global_norm(partitions, group) for partitions in zero.averaged_gradients.values()]


def offloaded_gradient_norms(zero: Any, group: ProcessGroup) -> list[Tensor]:
    """Return the same where the gradients go to the host, with an offloaded optimiser."""
    # DeepSpeed takes the norm of a partition when it copies it to the host; empty ones have none.
    norms, totals = zero.norm_for_param_grads, []
    for parameters in zero.fp16_groups:
        empty = torch.zeros((), dtype=torch.float64, device=parameters[0].ds_tensor.device)
        ids = [zero.get_param_id(parameter) for parameter in parameters]
        totals.append(norm_over_ranks([norms.get(id, empty) for id in ids], group))
    return totals


def global_norm(partitions: Sequence[Tensor], group: ProcessGroup) -> Tensor:
    """Return the norm over the partitions of all ranks. All ranks call it."""
    # torch.nn.utils.clip_grad_norm_ takes the norms of many tensors by this function, too.
    return norm_over_ranks(torch._foreach_norm(list(partitions), 2, torch.float64), group)


def norm_over_ranks(norms: Sequence[Tensor], group: ProcessGroup) -> Tensor:
    """Return the norm over all ranks from the `norms` of this rank's partitions, scalars."""
    square = torch.stack(list(norms)).square().sum()
    dist.all_reduce(square, group=group)
    return square.sqrt()


def combined_norm(norms: Sequence[Tensor], scale: float) -> Tensor:
    """Return `scale` times the norm of `norms`, a float64 scalar; inf if it is not finite."""
    total = scale * torch.linalg.vector_norm(torch.stack(list(norms)).double())
    return torch.where(total.isfinite(), total, math.inf)
