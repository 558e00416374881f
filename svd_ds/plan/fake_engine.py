"""Engine on fake tensors: ZeRO-3's gathered weights and gradients around a network on one device.

DeepSpeed itself does not run on fake tensors. What it keeps in memory while a step runs is reproduced by
hooks, as deepspeed 0.19.8 has it: the weights of a unit (a leaf module, or any other module with parameters)
are whole from before its forward pass until after it, and again in its backward pass; the gradients of a leaf
module are whole until its backward pass is over, those of other parameters until they are accumulated.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from svd_ds.parallel.recompute import apply_recompute
from svd_ds.parallel.zero_leaf_modules import ensure_input_gradient
from svd_ds.plan.tracker import GATHERED, GRADIENTS, StepTracker


class FakeEngine:
    """Stand-in for svd_ds.parallel.engine.Engine with one rank, whose shards are whole parameters.

    Args:
        network: on fake tensors.
        blocks: name -> leaf module.
        trained: names of the parameters that are trained.
        offload: True if the optimiser's state is in host memory.
    """

    def __init__(
        self,
        network: nn.Module,
        blocks: Mapping[str, nn.Module],
        trained: Collection[str],
        device: torch.device,
        betas: tuple[float, float],
        offload: bool,
    ) -> None:
        self.module = network
        self.tracker: StepTracker
        """Tracker of the present run, which the caller sets."""
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in trained)
        self.units = _units(network, blocks)
        self._gathered: dict[str, list[Tensor]] = {name: [] for name in self.units}
        in_blocks = {id(parameter) for block in blocks.values() for parameter in block.parameters()}
        for name, (module, numel) in self.units.items():
            self._watch(name, module, numel, is_leaf=name in blocks)
        for parameter in network.parameters():
            if parameter.requires_grad:
                leaf = id(parameter) in in_blocks
                parameter.register_post_accumulate_grad_hook(self._keep if leaf else self._reduce)
        parameters = dict(network.named_parameters())
        sizes = {name: parameters[name].numel() for name in trained}
        self._on_device = torch.device("cpu") if offload else device
        self.flat = nn.Parameter(
            torch.zeros(sum(sizes.values()), dtype=torch.float32, device=self._on_device)
        )
        self.flat.grad = torch.zeros_like(self.flat)
        self._adam = torch.optim.AdamW([self.flat], lr=0.0, betas=betas, fused=True)
        moments = {name: torch.zeros_like(self.flat) for name in ("exp_avg", "exp_avg_sq")}
        step = torch.zeros((), dtype=torch.float32, device=self._on_device)
        self._adam.state[self.flat] = {"step": step, **moments}
        shards = self.flat.detach().split(list(sizes.values()))
        self._shards = dict(zip(sizes, shards, strict=True))

    def __call__(self, *inputs: Any, **named_inputs: Any) -> Any:
        """Run the network."""
        self.tracker.phase = "forward"
        return self.module(*inputs, **named_inputs)

    def backward(self, loss: Tensor, num_micro_batches: int = 1) -> None:
        """Run the backward pass, and discard the gradients."""
        self.kept = self.tracker.live()
        self.tracker.phase = "backward"
        (loss / num_micro_batches).backward()
        self.tracker.phase = "optimiser"

    def gradient_norm(self) -> Tensor:
        """Return the norm of the gradient, on the device."""
        assert self.flat.grad is not None
        norm = torch.linalg.vector_norm(self.flat.grad)
        return norm.to(self.tracker.device, non_blocking=True)

    def step(self, rates: Mapping[str, float]) -> None:
        """Take the optimiser's step."""
        self._adam.step()

    def local_shards(self) -> dict[str, Tensor]:
        """Return the shards of the trained parameters."""
        return dict(self._shards)

    def state_tensors(self) -> list[Tensor]:
        """Return the tensors that the optimiser keeps between steps."""
        assert self.flat.grad is not None
        moments = [value for value in self._adam.state[self.flat].values() if isinstance(value, Tensor)]
        return [self.flat, self.flat.grad, *moments]

    def _watch(self, name: str, module: nn.Module, numel: int, is_leaf: bool) -> None:
        dtype = next(module.parameters()).dtype

        def enter(*_: Any) -> None:
            tracker = self.tracker
            tracker.modules.append(name)
            tracker.part = GATHERED
            self._gathered[name].append(torch.empty(numel, dtype=dtype, device=tracker.device))
            tracker.part = None

        def leave(*_: Any) -> None:
            if self._gathered[name]:
                self._gathered[name].pop()
                self.tracker.modules.remove(name)

        def leave_backward(*_: Any) -> None:
            if is_leaf:
                for parameter in module.parameters():
                    parameter.grad = None
            leave()

        module.register_forward_pre_hook(enter)
        if is_leaf and any(parameter.requires_grad for parameter in module.parameters()):
            module.register_forward_pre_hook(ensure_input_gradient)
        module.register_forward_hook(leave)
        module.register_full_backward_pre_hook(enter)
        module.register_full_backward_hook(leave_backward)

    def _keep(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.tracker.set_constant(parameter.grad, GRADIENTS)

    def _reduce(self, parameter: Tensor) -> None:
        self._keep(parameter)
        parameter.grad = None


@contextmanager
def one_rank() -> Iterator[None]:
    """Form a process group of one rank, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def recomputing(network: nn.Module, blocks: dict[str, nn.Module], policy: str) -> Iterator[None]:
    """Apply a recompute policy inside the context."""
    apply_recompute(network, blocks, policy)
    try:
        yield
    finally:
        for module in network.modules():
            # apply_recompute replaces `forward` of the instance; the class's stays.
            module.__dict__.pop("forward", None)


def _units(network: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, int]]:
    """Return name -> module and number of elements that are gathered together."""
    units = {name: (block, _numel(block, recurse=True)) for name, block in blocks.items()}
    inside = {id(module) for block in blocks.values() for module in block.modules()}
    for name, module in network.named_modules():
        if id(module) not in inside and (numel := _numel(module, recurse=False)):
            units[name or "network"] = (module, numel)
    return units


def _numel(module: nn.Module, recurse: bool) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse))
