"""Recomputation of activations: the same gradients, and the expected number of forward passes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from svd_ds.parallel.recompute import POLICIES, apply_recompute


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


class Attention(nn.Module):
    """Self-attention of 4 heads, as a block with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x_NSC: Tensor) -> Tensor:
        q, k, v = self.qkv(x_NSC).unflatten(-1, (3, 4, 8)).transpose(1, 3).unbind(2)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x_NSC + self.out(mixed.transpose(1, 2).flatten(2))


class Calls(TorchDispatchMode):
    """Counts the operators that are really computed, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[operator.name()] += 1
        return operator(*args, **(kwargs or {}))

    def forward_attentions(self) -> int:
        return sum(
            number
            for name, number in self.counts.items()
            if "_scaled_dot_product_" in name and "backward" not in name
        )


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


def test_full_recomputes_the_modules_around_the_blocks_once() -> None:
    net = nn.ModuleDict({"path": nn.ModuleList([Net(), Net()])})
    steps = [f"path.{step}.blocks.{block}" for step in (0, 1) for block in (0, 1)]
    apply_recompute(net, steps, "full")
    x, shift = torch.randn(2, 3, 4)
    net["path"][1](net["path"][0](x, shift), shift).sum().backward()
    assert [block.calls for step in net["path"] for block in step.blocks] == [2, 2, 2, 2]


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'all'.*one of none, blocks, attention, full"):
        apply_recompute(Net(), [], "all")


def attention_gradients(policy: str) -> tuple[dict[str, Tensor], Calls]:
    torch.manual_seed(0)
    net = nn.Sequential(Attention(), Attention())
    apply_recompute(net, ["0", "1"], policy)
    with Calls() as calls:
        net(torch.randn(2, 6, 32)).square().sum().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}, calls


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_the_same_with_every_policy(policy: str) -> None:
    expected, _ = attention_gradients("none")
    found, _ = attention_gradients(policy)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_kept_attention_is_not_computed_again() -> None:
    calls = {policy: attention_gradients(policy)[1] for policy in POLICIES}
    attentions = {policy: counted.forward_attentions() for policy, counted in calls.items()}
    assert attentions == {"none": 2, "blocks": 4, "attention": 2, "full": 4}
    projections = {policy: counted.counts["aten::addmm"] for policy, counted in calls.items()}
    assert projections["blocks"] == projections["attention"] > projections["none"]


@pytest.mark.parametrize(
    "operator",
    ["flash_attn::_flash_attn_forward", "flash_attn_3::_flash_attn_forward", "flash_attn_3::fwd"],
)
def test_kernels_of_other_packages_are_kept_by_their_operator_names(operator: str) -> None:
    runs = []

    def forward(x: Tensor) -> Tensor:
        runs.append(operator)
        return x.tanh()

    kernel = torch.library.custom_op(operator, forward, mutates_args=())
    kernel.register_autograd(
        lambda ctx, grad: grad * (1 - ctx.saved_tensors[0] ** 2),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
    )

    class Kernel(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return kernel(super().forward(x)).sin()

    counts = {}
    for policy in ("blocks", "attention"):
        net = nn.Sequential(Kernel(4, 4))
        apply_recompute(net, ["0"], policy)
        runs.clear()
        net(torch.randn(2, 4)).sum().backward()
        counts[policy] = len(runs)
    assert counts == {"blocks": 2, "attention": 1}


def test_states_of_random_generators_are_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Tensor:
        raise AssertionError("the networks draw no random numbers")

    net = Net()
    apply_recompute(net, ["blocks.0", "blocks.1"], "blocks")
    monkeypatch.setattr(torch, "get_rng_state", refuse)
    gradients(net)
    assert [block.calls for block in net.blocks] == [2, 2]
