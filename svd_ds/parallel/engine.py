"""Training engine: DeepSpeed ZeRO-3 with a small interface. No other module imports deepspeed.

    with Engine.sharded_init(config, mpu):
        module = Network()                      # every parameter is sharded as soon as it is created
    engine = Engine(module, groups, config, mpu)
    engine.load_full(stream of (name, tensor))  # each rank keeps its shard
    ...
    for micro_batch in step:
        engine.backward(loss(engine(x)))
    norm = engine.gradient_norm()
    engine.step({"group": rate})                # or engine.discard_gradients()

A parameter's shard on rank r is elements [r * n, (r + 1) * n) of the flattened parameter, where n is
ceil(numel / ranks). The shards, concatenated in rank order and cut to numel, are the parameter; their padding
is zero.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from svd_ds.parallel.gradient_norm import combined_norm, gradient_norms, offloaded_gradient_norms
from svd_ds.parallel.groups import ModelParallelUnit
from svd_ds.parallel.zero_leaf_modules import ensure_input_gradient, largest_leaf_module
from svd_ds.parallel.zero_shards import ZeroShards
from svd_ds.parallel.zero_streams import ZeroStreams

# Without it DeepSpeed warns on every rank that it had to detect the accelerator.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import set_z3_leaf_module

from svd_ds.parallel.zero_host_cost import finiteness_known, replace_host_loops


class Engine:
    """Module whose weights, gradients and optimiser state are sharded over the data-parallel ranks.

    Args:
        module: built inside `sharded_init`.
        groups: parameter groups as torch.optim takes them, each with `params`, `name` and `weight_decay`. A
            parameter in no group is frozen.
        config: result of `deepspeed_config`, the same as for `sharded_init`.
        leaves: modules whose parameters are gathered and released together. Their inputs and outputs are
            tensors, and their outputs must not be changed in place.
        fast_host_loops: replace DeepSpeed's loops over parameters and ranks (zero_host_cost.py).
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[dict[str, Any]],
        config: Mapping[str, Any],
        mpu: ModelParallelUnit,
        *,
        leaves: Iterable[nn.Module] = (),
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fast_host_loops: bool = True,
    ) -> None:
        leaves = list(leaves)
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        for leaf in leaves:
            set_z3_leaf_module(leaf, True)
            if any(parameter.requires_grad for parameter in leaf.parameters()):
                leaf.register_forward_pre_hook(ensure_input_gradient)
        # `step` sets the learning rate of every group.
        self._fused = "offload_optimizer" not in config["zero_optimization"]
        if self._fused:
            self._adam = torch.optim.AdamW(list(groups), lr=0.0, betas=betas, eps=eps, fused=True)
        else:
            if mpu.get_data_parallel_rank() == 0:
                print(
                    "loading DeepSpeed's CPU Adam: the first time it is compiled, which takes minutes",
                    file=sys.stderr,
                )
            self._adam = DeepSpeedCPUAdam(list(groups), lr=0.0, betas=betas, eps=eps)
        _start_communication()
        max_live = {"stage3_max_live_parameters": 2 * largest_leaf_module(leaves)}
        config = {**config, "zero_optimization": max_live | config["zero_optimization"]}
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=module, optimizer=self._adam, config=config, mpu=mpu
        )
        self.module = module
        self.group = mpu.get_data_parallel_group()
        self._num_backwards, self._num_micro_batches = 0, 1
        self._norms: list[Tensor] | None = None
        rank = mpu.get_data_parallel_rank()
        self._streams = ZeroStreams(self._zero, get_accelerator().current_stream)
        with self._streams.writing_shards():
            self._shards = ZeroShards(module, self._zero, self._adam, rank, fused=self._fused)
        self.shapes = self._shards.shapes
        if self._fused:
            self._streams.let_host_run_ahead()
        self.notes: list[str] = []
        """Lines for the console."""
        self._replaced = fast_host_loops and self._replace_host_loops(config["zero_optimization"])

    @staticmethod
    def sharded_init(config: Mapping[str, Any], mpu: ModelParallelUnit) -> AbstractContextManager[None]:
        """Return a context in which modules are built sharded: no rank holds more than one full submodule.

        The initial values are those of rank 0. Floating-point buffers get the compute precision as well.
        """
        _start_communication()
        return deepspeed.zero.Init(
            config_dict_or_path=dict(config), data_parallel_group=mpu.get_data_parallel_group(), mpu=mpu
        )

    def __call__(self, *inputs: Any, **named_inputs: Any) -> Any:
        """Run the module. All ranks call it together, under torch.no_grad too."""
        output = self._engine(*inputs, **named_inputs)
        if not torch.is_grad_enabled():
            # DeepSpeed keeps the last blocks gathered for a backward pass, but none follows.
            self._zero.empty_partition_cache()
        return output

    def backward(self, loss: Tensor, num_micro_batches: int = 1) -> None:
        """Add the gradient of a micro-batch's mean loss. A step averages over its micro-batches and ranks.

        Args:
            loss: mean over the clips of this rank's micro-batch, a scalar.
            num_micro_batches: micro-batches of this step.
        """
        self._num_backwards += 1
        self._norms = None
        self._num_micro_batches = num_micro_batches
        self._engine.set_gradient_accumulation_boundary(self._num_backwards == self._num_micro_batches)
        # Scaled here: DeepSpeed knows only the number in its configuration.
        self._engine.backward(loss / self._num_micro_batches, scale_wrt_gas=False)

    def gradient_norm(self) -> Tensor:
        """Return the global norm of the mean gradient since the last step; inf if it is not finite.

        All ranks call it, after at least one `backward`. The norm is a scalar on the device: to read it waits
        for the device, to call this does not.
        """
        if self._num_backwards != self._num_micro_batches:
            # An offloaded optimiser gets its gradients only at the end of a step.
            self._zero.finalize_gradient_accumulation_boundary()
        # DeepSpeed has divided the gradient by the micro-batches of a complete step.
        return combined_norm(self._group_norms(), self._num_micro_batches / self._num_backwards)

    def step(self, rates: Mapping[str, float], norm: float | None = None) -> None:
        """Clip the gradient, take one AdamW step, and discard the gradients.

        If the gradient is not finite, no weight changes.

        Args:
            rates: name of each parameter group -> its learning rate.
            norm: result of `gradient_norm`, if the caller has read it; else it is read here.
        """
        seen, due = self._num_backwards, self._num_micro_batches
        assert seen == due, f"a step of {due} micro-batches ends after {seen}"
        for group in self._adam.param_groups:
            group["lr"] = rates[group["name"]]
        known = self._replaced and norm is not None
        answered = finiteness_known(norm != math.inf) if known else nullcontext()
        with answered, self._streams.writing_shards():
            self._engine.step()
        self._num_backwards, self._norms = 0, None

    def discard_gradients(self) -> None:
        """Discard the gradients since the last step."""
        # DeepSpeed's own reaction to a gradient that is not finite; it only logs the argument.
        self._zero._overflow_clean_up(prev_scale=1.0)
        self._num_backwards, self._norms = 0, None

    def local_shards(self) -> dict[str, Tensor]:
        """Return name -> this rank's flat shard of the float32 master weights of trained parameters.

        They are views of the optimiser's buffers; `load_full` also updates the copy in the compute precision.
        """
        return dict(self._shards.masters)

    def frozen_shards(self) -> dict[str, Tensor]:
        """Return name -> this rank's flat float32 shard, in host memory, of every frozen parameter."""
        return dict(self._shards.frozen)

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Return AdamW's exp_avg and exp_avg_sq as name -> flat shard: views, which may be written to."""
        return {moment: dict(shards) for moment, shards in self._shards.moments.items()}

    @property
    def updates(self) -> int:
        """Number of steps that AdamW has taken, for its bias correction."""
        return self._shards.updates

    @updates.setter
    def updates(self, count: int) -> None:
        self._shards.updates = count

    def gather(self, name: str, shard: Tensor) -> Tensor:
        """Return the full parameter `name` from every rank's `shard`. All ranks call it."""
        shape = self.shapes[name]
        full = shard.new_empty(shard.numel() * dist.get_world_size(self.group))
        dist.all_gather_into_tensor(full, shard.contiguous(), group=self.group)
        return full[: shape.numel()].view(shape)

    def load_full(self, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Load float32 weights from a stream of full tensors; each rank keeps its shard. All ranks call it.

        Returns:
            Names of parameters that the stream lacks.

        Raises:
            ValueError: the stream has a parameter that the module lacks, or that has another shape there.
        """
        return self.load_shards((name, self._shards.cut(name, tensor)) for name, tensor in tensors)

    @torch.no_grad()
    def load_shards(self, shards: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Load weights from a stream of this rank's flat shards, padded with zeros; see `load_full`."""
        missing = dict.fromkeys(self.shapes)
        with self._parameters_released():
            for name, shard in shards:
                self._shards.write(name, shard)
                missing.pop(name, None)
        return list(missing)

    @contextmanager
    def weights(self, shards: Mapping[str, Tensor]) -> Iterator[None]:
        """Replace weights inside the context by flat `shards` of this rank, such as those of averages."""
        original = {name: self._shards.parameters[name].ds_tensor.clone() for name in shards}
        self._set_compute_shards(shards)
        try:
            yield
        finally:
            self._set_compute_shards(original)

    def _replace_host_loops(self, settings: Iterable[str]) -> bool:
        reason = replace_host_loops(self.module.parameters(), self._zero, settings, self._group_norms)
        if reason is not None:
            self.notes.append(
                f"DeepSpeed's own loops over parameters and ranks are used: {reason}; on many ranks they may "
                "take longer than the GPUs"
            )
        return reason is None

    def _group_norms(self) -> list[Tensor]:
        """Return the gradient's norm of each parameter group."""
        if self._norms is None:
            read = gradient_norms if self._fused else offloaded_gradient_norms
            self._norms = read(self._zero, self.group)
        return self._norms

    @torch.no_grad()
    def _set_compute_shards(self, shards: Mapping[str, Tensor]) -> None:
        with self._parameters_released():
            self._shards.write_compute(shards)

    @contextmanager
    def _parameters_released(self) -> Iterator[None]:
        """Release all gathered parameters inside the context; persistent ones are gathered again after it."""
        self._zero.checkpoint_event_prologue()
        with self._streams.writing_shards():
            yield
        self._zero.checkpoint_event_epilogue()


def _start_communication() -> None:
    """Initialise DeepSpeed's communication on top of torch.distributed."""
    # On CPUs DeepSpeed would compile, for 40 seconds, a shared-memory all-reduce that only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls functions whose names newer versions of torch deprecate.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    deepspeed.init_distributed()
