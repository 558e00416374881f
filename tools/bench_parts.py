"""How tools/bench.py measures: our network and diffusers' side by side, in one process, on the same weights.

Time is taken in pairs, ours then theirs, so that a machine that slows down slows both. Floating-point
operations are counted by torch on the meta device, where nothing is computed.
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
from bench_cases import DTYPES, Case, Inputs
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from svd_ds.model.layouts import config_to_diffusers
from svd_ds.model.unet import UNet
from svd_ds.model.weights import save_unet
from svd_ds.parallel.recompute import apply_recompute
from svd_ds.training.usage import forward_flops

AGREEMENT = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest relative difference of the two outputs. A GPU's float32 convolutions may run in tf32."""
VARIANTS = {
    "contiguous": (torch.contiguous_format, torch.contiguous_format),
    "channels_last": (torch.channels_last, torch.channels_last_3d),
}
"""Memory formats of diffusers' 2-D and 3-D convolutions."""


@dataclass(frozen=True)
class Result:
    """Seconds a step and, where there is a GPU, peak bytes: ours, then theirs."""

    case: Case
    variant: str
    difference: float
    seconds: list[tuple[float, float]]
    flops: tuple[int, int]
    peak_bytes: tuple[int, int] | None

    @property
    def medians(self) -> tuple[float, float]:
        ours, theirs = zip(*self.seconds, strict=True)
        return statistics.median(ours), statistics.median(theirs)

    @property
    def ratios(self) -> list[float]:
        """How many times as long as ours their step took, pair by pair."""
        return [theirs / ours for ours, theirs in self.seconds]

    def mfu(self, peak: float) -> list[float]:
        """Three times the operations of each forward, over the step's time, as a share of `peak` a second."""
        clips = self.case.batch or 1
        return [
            3 * clips * flops / (seconds * peak)
            for flops, seconds in zip(self.flops, self.medians, strict=True)
        ]


class Contestant:
    """A network and its optimiser, whose step is forward, backward and AdamW."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        # At rate 0 a step costs the same, and all steps have the same weights.
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, fused=True)
        self.peak_bytes = 0

    def step(self, inputs: Inputs) -> float:
        """Seconds of one step of a loss that pulls the output towards zero."""
        device = inputs[0].device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        started = time.perf_counter()
        run(self.network, inputs).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(device)
        seconds = time.perf_counter() - started
        if device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(device)
        return seconds

    def held_bytes(self) -> int:
        """What it keeps between steps: weights and the optimiser's averages."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        return sum(tensor.nbytes for tensor in (*self.network.parameters(), *states))


def run(network: nn.Module, inputs: Inputs) -> Tensor:
    output: Any = network(*inputs)
    return output if isinstance(output, Tensor) else output.sample


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(case: Case, pairs: int, device: torch.device, advance: Callable[[], None]) -> Result | None:
    """Time `pairs` of steps, calling `advance` after each; None where one clip does not fit the GPU."""
    try:
        network, public = build_networks(case, device)
        difference = output_difference(network, public, case.inputs(device))
        assert difference < AGREEMENT[case.dtype], f"the outputs differ by {difference:.1e}"
        apply_recompute(network, network.blocks(), case.recompute)
        if case.recompute != "none":
            public.enable_gradient_checkpointing()
        variant = choose_variant(public, case.inputs(device))
        ours, theirs = Contestant(network), Contestant(in_format(public, variant))
        if case.batch is None:
            case = replace(case, batch=largest_batch(case, (ours, theirs), device))
        inputs = case.inputs(device)
        for contestant in (ours, theirs):
            contestant.step(inputs)  # the first is slower: memory is found, kernels are chosen
        seconds = []
        for _ in range(pairs):
            seconds.append((ours.step(inputs), theirs.step(inputs)))
            advance()
    except torch.cuda.OutOfMemoryError:
        return None
    peaks = None
    if device.type == "cuda":
        # Both lie on the GPU: what the other one holds is not this one's.
        peaks = (ours.peak_bytes - theirs.held_bytes(), theirs.peak_bytes - ours.held_bytes())
    return Result(case, variant, difference, seconds, both_forward_flops(case), peaks)


def build_networks(case: Case, device: torch.device) -> tuple[UNet, Any]:
    """Our network and diffusers', with the same random weights, none of them at zero."""
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
    """Norm of the difference over norm of diffusers' output."""
    expected = run(public, inputs).float()
    return float((run(network, inputs).float() - expected).norm() / expected.norm())


def choose_variant(public: nn.Module, inputs: Inputs) -> str:
    """The memory format in which diffusers' network takes its best of two steps the faster."""
    seconds = {}
    for variant in VARIANTS:
        contestant = Contestant(in_format(public, variant))
        seconds[variant] = min([contestant.step(inputs) for _ in range(3)][1:])
    return min(seconds, key=seconds.__getitem__)


def in_format(public: nn.Module, variant: str) -> nn.Module:
    """The same network, its convolutions' weights in another order in memory."""
    formats = dict(zip((4, 5), VARIANTS[variant], strict=True))
    for parameter in public.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])
    return public


def largest_batch(case: Case, contestants: tuple[Contestant, ...], device: torch.device) -> int:
    """The largest power of two of clips whose steps fit the GPU, beside the weights of both sides."""
    batch = 1
    while fits(replace(case, batch=2 * batch), contestants, device):
        batch *= 2
    return batch


def fits(case: Case, contestants: tuple[Contestant, ...], device: torch.device) -> bool:
    try:
        for contestant in contestants:
            contestant.step(case.inputs(device))
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        for contestant in contestants:
            contestant.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
    return True


@torch.no_grad()
def both_forward_flops(case: Case) -> tuple[int, int]:
    """Operations of a forward pass, ours and diffusers'; a multiplication and its sum are two."""
    from diffusers import UNetSpatioTemporalConditionModel

    ours = forward_flops(case.config, case.num_frames, case.height, case.width, case.num_tokens)
    meta = torch.device("meta")
    with meta:
        public: Any = UNetSpatioTemporalConditionModel.from_config(config_to_diffusers(case.config))
    # It makes its mix factors on the CPU all the same.
    public.to(meta)
    with FlopCounterMode(display=False) as counter:
        run(public, replace(case, batch=1, dtype="fp32").inputs(meta))
    return ours, counter.get_total_flops()


def matmul_peak(dtype: str, device: torch.device) -> float:
    """Operations a second of the fastest of ten products of two large square matrices."""
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
