"""Gradient norm of a single rank before the reduction over ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from svd_ds.parallel.local_norm import LocalNorm


def test_norm_is_accumulated_from_start_to_take() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    network[0].bias.requires_grad_(False)
    local_norm = LocalNorm(network)

    def backward() -> float:
        """Return the norm of the gradients of a backward pass, and discard them."""
        network(torch.randn(2, 3)).square().sum().backward()
        norm = math.hypot(*(p.grad.norm().item() for p in network.parameters() if p.grad is not None))
        network.zero_grad()
        return norm

    backward()
    assert local_norm.take() is None
    local_norm.start()
    local_norm.start()
    norm = backward()
    taken = local_norm.take()
    assert taken is not None and taken.item() == pytest.approx(norm, rel=1e-5), "each gradient counts once"
    norms = [backward(), backward()]
    taken = local_norm.take()
    assert taken is not None and taken.item() == pytest.approx(math.hypot(*norms), rel=1e-5)
    assert local_norm.take() is None
