"""How tools/bench/train_step.py measures: our network and diffusers' side by side, in one process, on the
same weights.

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
from cases import DTYPES, Case, Inputs
from contestant import Contestant, peak_of_step, run, synchronize
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from svd_ds.model.unet import UNet
from svd_ds.parallel.recompute import apply_recompute
from svd_ds.training.usage import unet_forward_flops
from svd_ds.weights.io import save_unet
from svd_ds.weights.public_configs import config_to_diffusers

AGREEMENT = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest relative difference of the two outputs. A GPU's float32 convolutions may run in tf32."""
VARIANTS = {
    "contiguous": (torch.contiguous_format, torch.contiguous_format),
    "channels_last": (torch.channels_last, torch.channels_last_3d),
}
"""Memory formats of diffusers' 2-D and 3-D convolutions."""


@dataclass(frozen=True)
class Result:
    """Seconds and peak bytes a step: ours, then theirs."""

    case: Case
    variant: str
    difference: float
    seconds: list[tuple[float, float]]
    flops: tuple[int, int]
    peak_bytes: tuple[int, ...]
    largest: tuple[int, ...] | None
    """The most clips a step can have, where that was asked for."""

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


def measure(case: Case, pairs: int, device: torch.device, advance: Callable[[], None]) -> Result | None:
    """Time `pairs` of steps, calling `advance` after each; None where one clip does not fit the GPU.

    One network at a time lies on a GPU, for either to have all of it.
    """
    try:
        network, public = build_networks(case, device)
        difference = output_difference(network, public, case.inputs(device))
        assert difference < AGREEMENT[case.dtype], f"the outputs differ by {difference:.1e}"
        network.cpu()
        apply_recompute(network, network.blocks(), case.recompute)
        if case.recompute != "none":
            public.enable_gradient_checkpointing()
        variant = choose_variant(public, case.inputs(device))
        contestants = (Contestant(network), Contestant(in_format(public.cpu(), variant)))
        largest = None
        if case.batch is None:
            largest = tuple(largest_batch(case, contestant, device) for contestant in contestants)
            case = replace(case, batch=max(1, min(largest)))
        inputs = case.inputs(device)
        peaks = []
        for contestant in contestants:
            with contestant.resident(device):
                # Its first step is slower too: memory is found, kernels are chosen.
                extra = peak_of_step(contestant, inputs)
                peaks.append(contestant.held_bytes() + extra)
        seconds = []
        for _ in range(pairs):
            ours, theirs = (timed(contestant, inputs) for contestant in contestants)
            seconds.append((ours, theirs))
            advance()
    except torch.cuda.OutOfMemoryError:
        return None
    return Result(case, variant, difference, seconds, both_forward_flops(case), tuple(peaks), largest)


def timed(contestant: Contestant, inputs: Inputs) -> float:
    """Seconds of a step. On a GPU, where it has just arrived, it takes one before."""
    device = inputs[0].device
    with contestant.resident(device):
        if device.type == "cuda":
            contestant.step(inputs)
        return contestant.step(inputs)


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


def largest_batch(case: Case, contestant: Contestant, device: torch.device) -> int:
    """As many clips as a step can have that has the GPU to itself; 0 where not even one fits."""
    with contestant.resident(device):
        most = 1
        while fits(replace(case, batch=most), contestant, device):
            most *= 2
        least = most // 2
        while most - least > 1:
            middle = (least + most) // 2
            if fits(replace(case, batch=middle), contestant, device):
                least = middle
            else:
                most = middle
    return least


def fits(case: Case, contestant: Contestant, device: torch.device) -> bool:
    try:
        contestant.step(case.inputs(device))
        fitted = True
    except torch.cuda.OutOfMemoryError:
        fitted = False
    contestant.forget()
    gc.collect()
    torch.cuda.empty_cache()
    return fitted


@torch.no_grad()
def both_forward_flops(case: Case) -> tuple[int, int]:
    """Operations of a forward pass, ours and diffusers'; a multiplication and its sum are two."""
    from diffusers import UNetSpatioTemporalConditionModel

    ours = unet_forward_flops(case.config, case.num_frames, case.height, case.width, case.num_tokens)
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
