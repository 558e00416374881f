from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from svd_ds.parallel.recompute import apply_recompute


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.linear(x)) + shift


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, shift)
        return x


def gradients(net: Net) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, shift = torch.randn(2, 3, 4, generator=generator)
    net(x, shift).square().sum().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def test_named_blocks_run_twice_and_the_gradients_are_the_same() -> None:
    net, plain = Net(), Net()
    plain.load_state_dict(net.state_dict())
    apply_recompute(net, ["blocks.1"], "blocks")
    assert list(net.state_dict()) == list(plain.state_dict())
    ours, theirs = gradients(net), gradients(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [block.calls for block in net.blocks] == [1, 2]


def test_without_gradients_blocks_run_once() -> None:
    net = Net()
    apply_recompute(net, ["blocks.0", "blocks.1"], "blocks")
    with torch.no_grad():
        net(torch.zeros(1, 4), torch.zeros(1, 4))
    assert [block.calls for block in net.blocks] == [1, 1]


def test_none_keeps_activations() -> None:
    net = Net()
    apply_recompute(net, ["blocks.0", "blocks.1"], "none")
    gradients(net)
    assert [block.calls for block in net.blocks] == [1, 1]


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'all'.*none or blocks"):
        apply_recompute(Net(), [], "all")
