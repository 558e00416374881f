"""Comparison of our network with diffusers', for train_step.py: same process, same weights.

Steps are timed in pairs, ours then diffusers', so that a slow phase of the machine affects both.
Floating-point operations are counted by torch on the meta device, without computing anything.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import DTYPES, Case, Inputs
from timed_network import TimedNetwork, measure_step_memory, run, synchronize
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from svd_ds.model.unet import UNet
from svd_ds.parallel.recompute import apply_recompute
from svd_ds.training.usage import unet_forward_flops
from svd_ds.weights.io import save_unet
from svd_ds.weights.public_configs import config_to_diffusers

AGREEMENT = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest allowed relative difference of the two outputs; a GPU's float32 convolutions may run in tf32."""
MEMORY_FORMATS = {
    "contiguous": (torch.contiguous_format, torch.contiguous_format),
    "channels_last": (torch.channels_last, torch.channels_last_3d),
}
"""Name -> memory formats of diffusers' 2-D and 3-D convolutions."""


@dataclass(frozen=True)
class Comparison:
    """Time and memory of a training step; in pairs our network is first, diffusers' second."""

    case: Case
    memory_format: str
    """Name of diffusers' memory format."""
    difference: float
    """Relative difference of the outputs."""
    seconds: list[tuple[float, float]]
    """Time of each pair of steps."""
    flops: tuple[int, int]
    """Operations of a forward pass of one clip."""
    peak_bytes: tuple[int, ...]
    largest_batch: tuple[int, ...] | None
    """Largest number of clips in a step; None if it was not measured."""

    @property
    def medians(self) -> tuple[float, float]:
        """Median time of a step in seconds."""
        ours, theirs = zip(*self.seconds, strict=True)
        return statistics.median(ours), statistics.median(theirs)

    @property
    def ratios(self) -> list[float]:
        """Ratio of diffusers' time to ours, of each pair."""
        return [theirs / ours for ours, theirs in self.seconds]

    def mfu(self, peak: float) -> list[float]:
        """Compute the model FLOPs utilisation: 3 x forward operations / (time of a step x `peak`)."""
        clips = self.case.batch or 1
        return [
            3 * clips * flops / (seconds * peak)
            for flops, seconds in zip(self.flops, self.medians, strict=True)
        ]


def measure(case: Case, pairs: int, device: torch.device, advance: Callable[[], None]) -> Comparison | None:
    """Compare our network with diffusers'.

    Only one network at a time is on a GPU, so that each has all of its memory.

    Args:
        case: network, clip and precision.
        pairs: number of timed pairs of steps.
        device: device of the steps.
        advance: called after each pair.

    Returns:
        None if a step of one clip does not fit the GPU.
    """
    try:
        network, public = build_networks(case, device)
        difference = output_difference(network, public, case.inputs(device))
        assert difference < AGREEMENT[case.dtype], f"the outputs differ by {difference:.1e}"
        network.cpu()
        apply_recompute(network, network.blocks(), case.recompute)
        if case.recompute != "none":
            public.enable_gradient_checkpointing()
        memory_format = fastest_memory_format(public, case.inputs(device))
        networks = (TimedNetwork(network), TimedNetwork(set_memory_format(public.cpu(), memory_format)))
        largest = None
        if case.batch is None:
            largest = tuple(find_largest_batch(case, timed_network, device) for timed_network in networks)
            case = replace(case, batch=max(1, min(largest)))
        inputs = case.inputs(device)
        peaks = []
        for timed_network in networks:
            with timed_network.resident(device):
                # This includes the first step, which is slower (allocation, choice of kernels).
                extra = measure_step_memory(timed_network, inputs)
                peaks.append(timed_network.held_bytes() + extra)
        seconds = []
        for _ in range(pairs):
            ours, theirs = (timed(timed_network, inputs) for timed_network in networks)
            seconds.append((ours, theirs))
            advance()
    except torch.cuda.OutOfMemoryError:
        return None
    return Comparison(
        case, memory_format, difference, seconds, both_forward_flops(case), tuple(peaks), largest
    )


def timed(timed_network: TimedNetwork, inputs: Inputs) -> float:
    """Time a step, in seconds; on a GPU after a warm-up step, since the network was just moved there."""
    device = inputs[0].device
    with timed_network.resident(device):
        if device.type == "cuda":
            timed_network.step(inputs)
        return timed_network.step(inputs)


def build_networks(case: Case, device: torch.device) -> tuple[UNet, Any]:
    """Build our network and diffusers' with the same random weights, none of them zero."""
    from diffusers import UNetSpatioTemporalConditionModel

    torch.manual_seed(0)
    network = UNet(case.config)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    with tempfile.TemporaryDirectory(prefix="svd_ds-bench-") as folder:
        save_unet(network, folder)
        public: Any = UNetSpatioTemporalConditionModel.from_pretrained(
            folder, torch_dtype=DTYPES[case.dtype], low_cpu_mem_usage=False
        )
    return network.to(device, DTYPES[case.dtype]), public.to(device).train()


@torch.no_grad()
def output_difference(network: nn.Module, public: nn.Module, inputs: Inputs) -> float:
    """Compute the norm of the difference of the outputs over the norm of diffusers'."""
    expected = run(public, inputs).float()
    return float((run(network, inputs).float() - expected).norm() / expected.norm())


def fastest_memory_format(public: nn.Module, inputs: Inputs) -> str:
    """Choose the memory format in which diffusers' network is faster, by the better of two steps."""
    seconds = {}
    for memory_format in MEMORY_FORMATS:
        timed_network = TimedNetwork(set_memory_format(public, memory_format))
        seconds[memory_format] = min([timed_network.step(inputs) for _ in range(3)][1:])
    return min(seconds, key=seconds.__getitem__)


def set_memory_format(public: nn.Module, memory_format: str) -> nn.Module:
    """Change the memory format of a network's convolution weights in place, and return the network."""
    formats = dict(zip((4, 5), MEMORY_FORMATS[memory_format], strict=True))
    for parameter in public.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])
    return public


def find_largest_batch(case: Case, timed_network: TimedNetwork, device: torch.device) -> int:
    """Find the largest number of clips in a step on the GPU; 0 if not even one fits."""
    with timed_network.resident(device):
        upper = 1
        while fits(replace(case, batch=upper), timed_network, device):
            upper *= 2
        lower = upper // 2
        while upper - lower > 1:
            middle = (lower + upper) // 2
            if fits(replace(case, batch=middle), timed_network, device):
                lower = middle
            else:
                upper = middle
    return lower


def fits(case: Case, timed_network: TimedNetwork, device: torch.device) -> bool:
    """Return True if a step does not run out of memory."""
    try:
        timed_network.step(case.inputs(device))
        fitted = True
    except torch.cuda.OutOfMemoryError:
        fitted = False
    timed_network.discard_gradients()
    gc.collect()
    torch.cuda.empty_cache()
    return fitted


@torch.no_grad()
def both_forward_flops(case: Case) -> tuple[int, int]:
    """Count the operations of a forward pass, ours and diffusers'; a multiply-add counts as two."""
    from diffusers import UNetSpatioTemporalConditionModel

    ours = unet_forward_flops(case.config, case.num_frames, case.height, case.width, case.num_tokens)
    meta = torch.device("meta")
    with meta:
        public: Any = UNetSpatioTemporalConditionModel.from_config(config_to_diffusers(case.config))
    # diffusers makes its mix factors on the CPU even in this context.
    public.to(meta)
    with FlopCounterMode(display=False) as counter:
        run(public, replace(case, batch=1, dtype="fp32").inputs(meta))
    return ours, counter.get_total_flops()


def matmul_peak(dtype: str, device: torch.device) -> float:
    """Measure operations per second, of the fastest of ten products of two large square matrices."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    seconds = []
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
