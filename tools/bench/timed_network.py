"""A network with its optimiser whose training step is timed, and the memory of that step."""

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
RESET_PEAK = "5"
"""Value that resets VmHWM, see proc(5)."""


class TimedNetwork:
    """A network with its optimiser. A step is forward, backward and AdamW as in training: on float32 master
    weights, of which the network has copies if it computes in another dtype."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.weights = list(network.parameters())
        self.masters = [
            weight if weight.dtype == torch.float32 else weight.detach().float() for weight in self.weights
        ]
        # With a learning rate of 0 a step costs the same, and leaves the weights unchanged.
        self.optimizer = torch.optim.AdamW(self.masters, lr=0.0, fused=True)
        self.peak_bytes = 0

    def step(self, inputs: Inputs) -> float:
        """Take one step on the mean square of the output, and return its time in seconds."""
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
            # With one context token queries and keys have no gradient.
            master.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
        self.optimizer.step()
        for weight, master in copies:
            weight.copy_(master)
        self.optimizer.zero_grad()

    def discard_gradients(self) -> None:
        """Discard the gradients of a step that failed."""
        for tensor in (*self.weights, *self.masters):
            tensor.grad = None

    def held_bytes(self) -> int:
        """Return the bytes of the state between steps: weights and the optimiser's moments."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        return sum(tensor.nbytes for tensor in {*self.weights, *self.masters, *states})

    @contextmanager
    def resident(self, device: torch.device) -> Iterator[None]:
        """Move the network to a device in the context; afterwards free a GPU for the next network."""
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
    """Run our network or diffusers', and return the output."""
    output: Any = network(*inputs)
    return output if isinstance(output, Tensor) else output.sample


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_step_memory(timed_network: TimedNetwork, inputs: Inputs) -> int:
    """Measure the peak memory of a second step, when the optimiser has its moments, in bytes."""
    timed_network.step(inputs)
    gc.collect()
    if inputs[0].is_cuda:
        before = torch.cuda.memory_allocated()
        timed_network.step(inputs)
        return timed_network.peak_bytes - before
    # Freed memory that the allocator keeps would count.
    ctypes.CDLL(None).malloc_trim(0)
    before = process_bytes("VmRSS")
    CLEAR_REFS.write_text(RESET_PEAK)
    timed_network.step(inputs)
    return process_bytes("VmHWM") - before


def process_bytes(field: str) -> int:
    """Read a memory size of this process, such as VmRSS, in bytes (Linux)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
