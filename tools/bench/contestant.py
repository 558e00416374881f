"""What a benchmark times: a network and its optimiser, and the memory that a step of theirs takes."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cases import Inputs
from torch import Tensor, nn

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5)


class Contestant:
    """A network and its optimiser, whose step is forward, backward and AdamW in the trainer's arithmetic:
    on float32 weights, of which the network has copies where it computes in another dtype."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.weights = list(network.parameters())
        self.masters = [
            weight if weight.dtype == torch.float32 else weight.detach().float() for weight in self.weights
        ]
        # At rate 0 a step costs the same, and all steps have the same weights.
        self.optimizer = torch.optim.AdamW(self.masters, lr=0.0, fused=True)
        self.peak_bytes = 0

    def step(self, inputs: Inputs) -> float:
        """Seconds of one step of a loss that pulls the output towards zero."""
        device = inputs[0].device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        started = time.perf_counter()
        run(self.network, inputs).float().square().mean().backward()
        self._update()
        synchronize(device)
        seconds = time.perf_counter() - started
        if device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(device)
        return seconds

    @torch.no_grad()
    def _update(self) -> None:
        copies = [pair for pair in zip(self.weights, self.masters, strict=True) if pair[0] is not pair[1]]
        for weight, master in copies:
            # One context token needs no queries and keys: they have no gradient.
            master.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
        self.optimizer.step()
        for weight, master in copies:
            weight.copy_(master)
        self.optimizer.zero_grad()

    def forget(self) -> None:
        """Drop the gradients of a step that did not end."""
        for tensor in (*self.weights, *self.masters):
            tensor.grad = None

    def held_bytes(self) -> int:
        """What it keeps between steps: weights and the optimiser's averages."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        return sum(tensor.nbytes for tensor in {*self.weights, *self.masters, *states})

    @contextmanager
    def resident(self, device: torch.device) -> Iterator[None]:
        """Inside, it lies on the device: afterwards a GPU is another's, whole."""
        self._move(device)
        try:
            yield
        finally:
            if device.type == "cuda":
                self._move(torch.device("cpu"))
                gc.collect()
                torch.cuda.empty_cache()

    def _move(self, device: torch.device) -> None:
        self.network.to(device)
        for master in self.masters:
            master.data = master.data.to(device)
        for state in self.optimizer.state.values():
            state.update({name: value.to(device) for name, value in state.items()})


def run(network: nn.Module, inputs: Inputs) -> Tensor:
    output: Any = network(*inputs)
    return output if isinstance(output, Tensor) else output.sample


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_of_step(contestant: Contestant, inputs: Inputs) -> int:
    """Bytes of a second step, when the optimiser's averages are there."""
    contestant.step(inputs)
    gc.collect()
    if inputs[0].is_cuda:
        before = torch.cuda.memory_allocated()
        contestant.step(inputs)
        return contestant.peak_bytes - before
    # What the allocator keeps of freed memory would count as held.
    ctypes.CDLL(None).malloc_trim(0)
    before = held_bytes("VmRSS")
    CLEAR_REFS.write_text(RESET_PEAK)
    contestant.step(inputs)
    return held_bytes("VmHWM") - before


def held_bytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
