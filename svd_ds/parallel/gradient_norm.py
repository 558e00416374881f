"""Global norm of a gradient whose partitions lie on the ranks, computed without waiting for the device.

DeepSpeed's own functions read numbers on the host, or copy constants from there; both wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def global_norm(partitions: Sequence[Tensor], group: ProcessGroup) -> Tensor:
    """Return the norm over the partitions of all ranks, bit for bit DeepSpeed's. All ranks call it."""
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
