"""This rank's shards of the parameters and of the optimiser's state, found in DeepSpeed's buffers by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's names of the running means of the gradient and of its square."""


class ZeroShards:
    """Shards of every parameter of a module that DeepSpeed has sharded.

    Args:
        module: its parameters have ds_tensor, this rank's shard in the compute precision, and ds_shape.
        zero: DeepSpeed's ZeRO-3 optimiser.
        adam: the AdamW inside it.
        rank: rank in the data-parallel group.
        fused: the AdamW is torch's fused one, else DeepSpeed's on the host.
    """

    def __init__(self, module: nn.Module, zero: Any, adam: Any, rank: int, *, fused: bool) -> None:
        self._rank, self._adam, self._fused = rank, adam, fused
        self.parameters: dict[str, Any] = dict(module.named_parameters())
        self.shapes: dict[str, torch.Size] = {name: p.ds_shape for name, p in self.parameters.items()}
        self.masters: dict[str, Tensor] = {}
        """Float32 master weights of trained parameters, views of the optimiser's buffers."""
        self.frozen: dict[str, Tensor] = {}
        """Float32 weights of frozen parameters, in host memory."""
        self.moments: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
        """exp_avg and exp_avg_sq, views of the optimiser's buffers."""
        self._find_optimizer_state(zero)
        self._zero_padding()
        self._store_frozen_shards()

    @property
    def updates(self) -> int:
        """Number of steps that AdamW has taken, for its bias correction."""
        return int(next(iter(self._adam.state.values()))["step"])

    @updates.setter
    def updates(self, count: int) -> None:
        for state in self._adam.state.values():
            # The fused AdamW counts in a tensor on its device, DeepSpeed's in a number on the host.
            state["step"] = torch.full_like(state["step"], count) if self._fused else count

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """Return this rank's shard of a full `tensor`, padded with zeros.

        Raises:
            ValueError: the module has no such parameter, or one of another shape.
        """
        if name not in self.shapes:
            raise ValueError(f"the weights hold {name}, which the network does not have")
        if tensor.shape != self.shapes[name]:
            theirs, ours = tuple(tensor.shape), tuple(self.shapes[name])
            raise ValueError(f"the weights' {name} has shape {theirs}, the network's {ours}")
        numel = self.parameters[name].ds_tensor.numel()
        shard = tensor.reshape(-1)[self._rank * numel : (self._rank + 1) * numel]
        return nn.functional.pad(shard, (0, numel - shard.numel()))

    def write(self, name: str, shard: Tensor) -> None:
        """Write a float32 `shard`, and its copy in the compute precision."""
        float32_shards = self.masters if name in self.masters else self.frozen
        float32_shards[name].copy_(shard)
        self.parameters[name].ds_tensor.copy_(shard)

    def write_compute(self, shards: Mapping[str, Tensor]) -> None:
        """Write shards in the compute precision alone."""
        for name, shard in shards.items():
            self.parameters[name].ds_tensor.copy_(shard)

    def _find_optimizer_state(self, zero: Any) -> None:
        buffers = zero.fp32_partitioned_groups_flat
        for buffer in buffers:
            # AdamW creates its state at its first step, but a checkpoint is loaded before that.
            moments = {moment: torch.zeros_like(buffer) for moment in MOMENTS}
            step = torch.zeros((), device=buffer.device) if self._fused else 0
            self._adam.state[buffer] = {"step": step, **moments}
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                index, start, numel = zero.grad_position[zero.get_param_id(parameter)]
                self.masters[name] = buffers[index].detach().narrow(0, start, numel)
                for moment, shards in self.moments.items():
                    shards[name] = self._adam.state[buffers[index]][moment].narrow(0, start, numel)

    @torch.no_grad()
    def _zero_padding(self) -> None:
        # DeepSpeed leaves the end of the last rank's shard uninitialised.
        for name, parameter in self.parameters.items():
            kept = max(0, self.shapes[name].numel() - self._rank * parameter.ds_tensor.numel())
            parameter.ds_tensor[kept:].zero_()
            if name in self.masters:
                self.masters[name][kept:].zero_()

    def _store_frozen_shards(self) -> None:
        """Store float32 shards of frozen parameters: DeepSpeed stores those of trained parameters only."""
        for name, parameter in self.parameters.items():
            if name not in self.masters:
                self.frozen[name] = parameter.ds_tensor.detach().to("cpu", torch.float32)
