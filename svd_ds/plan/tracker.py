"""Tracking of a step on fake tensors: memory, operations, and mistakes that only a GPU would show.

The tracker is a dispatch mode: it sees every operation of the forward pass, of the backward pass and of the
optimiser. It counts the bytes of the device's storages, as torch's caching allocator would (rounded up to 512
bytes), and for each whether its size depends on the micro-batch. It reports
- an operation on tensors of different devices, which fails on a GPU,
- a read of a device number by the host, and a copy to the device that is not non_blocking: for both, the host
  waits until the GPU has done all the work before.

After such an operation the step continues, so that one run finds all of them.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from svd_ds.plan.operators import (
    Op,
    describe,
    locate,
    onednn_scratch,
    replace_tensors,
    stand_in_number,
    stand_in_result,
    tensors_in,
)
from svd_ds.plan.records import CLIP, CONSTANT, FRAME, Cost, Event, Storage

ROUND = 512
"""Size to which torch's CUDA allocator rounds up."""
GATHERED, GRADIENTS, SCRATCH = "gathered weights", "gradients", "scratch of convolutions"
"""Parts of the memory other than activations."""


class _Release(weakref.ref):  # type: ignore[type-arg]
    """Weak reference to a storage that knows its key."""

    __slots__ = ("key",)
    key: int


class StepTracker(TorchDispatchMode):
    """Tracks the tensors of `device` while it is active.

    Args:
        device: device of the step. If it is the CPU, mixed devices cannot be seen.
        constants: tensors from before the step whose size does not depend on the batch, such as parameters.
    """

    def __init__(self, device: torch.device, constants: Iterable[Tensor]) -> None:
        super().__init__()
        self.device = device
        self.phase = "encoders"
        self.part: str | None = None
        """Part of the memory that is allocated; None: activations of the module that runs."""
        self.modules: list[str] = [""]
        self.frames = self.frames_per_clip = 0
        """Set while the autoencoder encodes, see `encoding`."""
        self.chunks = 0
        """Chunks that the present call of the autoencoder has begun."""
        self.storages: list[Storage] = []
        self.scales: list[int] = []
        self.events: list[Event] = []
        self.costs: Counter[Cost] = Counter()
        self.launches: Counter[str] = Counter()
        self.host_reads: list[str] = []
        self.device_errors: list[str] = []
        self.host_operands: list[str] = []
        """Operations on device tensors with numbers or indices in host memory, which torch allows."""
        self.blocking_copies: list[str] = []
        """Copies from host memory to the device that are not non_blocking: the host waits for the device."""
        self._live: dict[int, int] = {}
        self._constants = {tensor.untyped_storage()._cdata for tensor in constants}
        self._references: dict[int, _Release] = {}
        self._producers: dict[int, Cost] = {}
        self._ops: dict[Any, Op] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = self._ops.get(func) or self._ops.setdefault(func, describe(func))
        if op.is_view:
            return func(*args, **kwargs)
        inputs = list(tensors_in((args, kwargs))) if kwargs else list(tensors_in(args))
        on_device = [t for t in inputs if self._is_on_device(t)]
        if len(on_device) < len(inputs) and on_device and not op.is_copy:
            args, kwargs = self._check_host_inputs(op, args, kwargs, inputs)
        if op.reads and inputs and isinstance(inputs[0], FakeTensor):
            if on_device:
                self.read(op.name)
            return stand_in_result(op.name, inputs[0])
        out = func(*args, **kwargs)
        outputs = list(tensors_in((out,)))
        self._account(op, args, kwargs, out, inputs, on_device, outputs)
        return out

    def kernel(self, name: str, args: Iterable[Any]) -> None:
        """Count a launch of a kernel that torch does not know, and check the devices of its tensors."""
        tensors = list(tensors_in(args))
        if any(not self._is_on_device(tensor) for tensor in tensors):
            self.device_errors.append(f"{locate()}: {name} takes a tensor in host memory")
        on_device = [tensor for tensor in tensors if self._is_on_device(tensor)]
        moved = [0.0, 0.0]
        for tensor in on_device:
            moved[self._scale(tensor) != CONSTANT] += tensor.numel() * tensor.element_size()
        self._spend("rest", 0.0, moved)

    def read(self, name: str) -> None:
        """Record that the host reads a number of the device."""
        self.host_reads.append(f"{locate()}: {name}")

    def read_list(self, tensor: FakeTensor) -> Any:
        """Record that the host reads a tensor by `tolist`, and return a list of its shape."""
        if self._is_on_device(tensor):
            self.read("tolist")
        values: Any = stand_in_number(tensor)
        for size in reversed(tensor.shape):
            values = [values] * size
        return values

    def set_constant(self, tensor: Tensor, part: str) -> None:
        """Correct a storage: its size, such as that of a gradient, does not depend on the micro-batch."""
        index = self._live.get(tensor.untyped_storage()._cdata)
        if index is None or self.scales[index] == CONSTANT:
            return
        size = self.storages[index].size
        self.scales[index] = CONSTANT
        self.storages[index] = self.storages[index]._replace(part=part)
        if (cost := self._producers.pop(index, None)) is not None:
            self.costs[cost] -= 1
            written = min(size, cost.bytes)
            corrected = cost._replace(
                bytes=cost.bytes - written, constant_bytes=cost.constant_bytes + written
            )
            self.costs[corrected] += 1

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors from before the step, which are proportional to the micro-batch."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if self._is_on_device(tensor) and key not in self._live:
                self._allocate(tensor, key, CLIP)

    def set_per_clip(self, tensor: Tensor) -> None:
        """Correct a storage: its size is proportional to the micro-batch, not to the chunk."""
        index = self._live.get(tensor.untyped_storage()._cdata)
        if index is not None:
            self.scales[index] = CLIP

    @contextmanager
    def module(self, name: str) -> Iterator[None]:
        """Attribute allocations to a module inside the context."""
        self.modules.append(name)
        try:
            yield
        finally:
            self.modules.pop()

    @contextmanager
    def encoding(self, frames: int, frames_per_clip: int) -> Iterator[None]:
        """Attribute allocations to a chunk of the autoencoder's frames inside the context."""
        self.frames, self.frames_per_clip, self.chunks = frames, frames_per_clip, 0
        try:
            yield
        finally:
            self.frames = self.frames_per_clip = 0

    def live(self) -> list[int]:
        """Return the indices of the storages in memory."""
        return list(self._live.values())

    def _is_on_device(self, tensor: Tensor) -> bool:
        if self.device.type == "cpu":
            return True
        return isinstance(tensor, FakeTensor) and tensor.fake_device.type == self.device.type

    def _scale(self, tensor: Tensor) -> int:
        key = tensor.untyped_storage()._cdata
        index = self._live.get(key)
        if index is not None:
            return self.scales[index]
        return CONSTANT if key in self._constants else CLIP

    def _check_host_inputs(self, op: Op, args: Any, kwargs: Any, inputs: list[Tensor]) -> tuple[Any, Any]:
        """Report tensors in host memory among those of the device, and replace them by tensors there."""
        host = [tensor for tensor in inputs if not self._is_on_device(tensor)]
        if op.takes_host_indices or all(tensor.dim() == 0 for tensor in host):
            self.host_operands.append(f"{locate()}: {op.name}")
            return args, kwargs
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in host if tensor.dim())
        self.device_errors.append(
            f"{locate()}: {op.name} takes a tensor of shape {shapes} in host memory, and others on the GPU"
        )
        replaced = {
            id(tensor): torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device
            )
            for tensor in host
        }
        return replace_tensors(args, replaced), replace_tensors(kwargs, replaced)

    def _account(
        self, op: Op, args: Any, kwargs: Any, out: Any,
        inputs: list[Tensor], on_device: list[Tensor], outputs: list[Tensor]
    ) -> None:  # fmt: skip
        results = [tensor for tensor in outputs if self._is_on_device(tensor)]
        if op.is_copy and len(on_device) + len(results) > 0:
            self._check_copy(op, args, kwargs, inputs, outputs)
        if not results and not on_device:
            return
        scale, moved, seen = CONSTANT, [0.0, 0.0], set()
        keys = set()
        for tensor in on_device:
            keys.add(tensor.untyped_storage()._cdata)
            its_scale = self._scale(tensor)
            scale = max(scale, min(its_scale, CLIP))
            if id(tensor) not in seen:
                seen.add(id(tensor))
                moved[its_scale != CONSTANT] += tensor.numel() * tensor.element_size()
        if len(on_device) < len(inputs) and op.is_copy:
            scale = CLIP
        if scale == CLIP and self.frames:
            scale = FRAME
        if op.kind == "conv" and self.device.type == "cpu" and (scratch := onednn_scratch(inputs, results)):
            self._count_scratch(scratch, scale)
        fresh = []
        for tensor in results:
            key = tensor.untyped_storage()._cdata
            if id(tensor) not in seen:
                moved[scale != CONSTANT] += tensor.numel() * tensor.element_size()
            if key not in keys and key not in self._live and key not in self._constants:
                fresh.append(self._allocate(tensor, key, scale))
        if op.allocates or not (fresh or op.is_mutable or op.flops):
            return
        flops = op.flops(*args, **kwargs, out_val=out) if op.flops else 0.0
        cost = self._spend(op.kind, flops, moved)
        if self.phase == "backward":
            for index in fresh:
                self._producers[index] = cost

    def _check_copy(
        self, op: Op, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        source = inputs[-1] if op.name == "aten::copy_" else inputs[0]
        target = outputs[0] if outputs else inputs[0]
        if self._is_on_device(source) and not self._is_on_device(target):
            self.read("copy to host memory")
        elif not self._is_on_device(source) and self._is_on_device(target):
            waits = not kwargs.get("non_blocking", op.name == "aten::copy_" and args[2:] == (True,))
            if waits:
                self.blocking_copies.append(f"{locate()}: {op.name}")

    def _allocate(self, tensor: Tensor, key: int, scale: int) -> int:
        storage = tensor.untyped_storage()
        size = -(-storage.nbytes() // ROUND) * ROUND
        index = self._add(size, self.part or self.modules[-1], CONSTANT if self.part else scale)
        self._live[key] = index
        reference = _Release(storage, self._release)
        reference.key = key
        self._references[key] = reference
        return index

    def _count_scratch(self, size: int, scale: int) -> None:
        """Count a buffer that an operation allocates and frees."""
        index = self._add(size, SCRATCH, scale)
        self.events.append(Event(~index, self.phase, self.modules[-1]))

    def _add(self, size: int, part: str, scale: int) -> int:
        index = len(self.storages)
        self.storages.append(Storage(size, self.phase, part, self.frames, self.frames_per_clip))
        self.scales.append(scale)
        self.events.append(Event(index, self.phase, self.modules[-1]))
        return index

    def _release(self, reference: _Release) -> None:
        del self._references[reference.key]
        index = self._live.pop(reference.key)
        self._producers.pop(index, None)
        self.events.append(Event(~index, self.phase, self.modules[-1]))

    def _spend(self, kind: str, flops: float, moved: list[float]) -> Cost:
        cost = Cost(self.phase, kind, flops, moved[1], moved[0], self.frames, self.frames_per_clip)
        self.launches[self.phase] += 1
        # Later chunks repeat the first one's operations.
        if not self.frames or self.chunks <= 1:
            self.costs[cost] += 1
        return cost
