"""Goodput, MFU and peak memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from svd_ds.json_lines import read_json_lines
from svd_ds.model.unet import PIXELS_PER_LATENT, UNet, UNetConfig
from svd_ds.run_folder import RunFolder
from svd_ds.weights.restarts import read_acquired_restarts

OVERHEADS = ("data", "checkpoint", "evaluation", "preview")
"""Activities of a run besides the computation of steps."""
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "A800": 312e12, "L40S": 362e12}
"""Part of a GPU's name -> its peak FLOP/s in dense bfloat16, by the vendor's data sheet, of the fastest
variant of that name. A PCIe card has a lower peak."""


class StageTimer:
    """Timer of a rank's overheads: `with timer("data"): ...` adds to one of OVERHEADS."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(OVERHEADS, 0.0)

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[kind] += time.perf_counter() - started

    def lap(self) -> dict[str, float]:
        """Return the seconds of each overhead since the last call."""
        seconds, self._seconds = self._seconds, dict.fromkeys(OVERHEADS, 0.0)
        return seconds


@dataclass
class Goodput:
    """Division of a run's wall time since its first start, over all restarts."""

    started: float
    """First start of the run, in seconds since the epoch."""
    compute_s: float
    """Seconds of computation; a step that was lost and computed again counts once."""
    overheads_s: dict[str, float]
    """Seconds of each of OVERHEADS."""

    @staticmethod
    def from_run_folder(folder: RunFolder) -> Goodput:
        """Read the times of a run so far from its restarts.jsonl and metrics.jsonl."""
        restarts = read_acquired_restarts(folder.checkpoints)
        started = restarts[0].time if restarts else time.time()
        goodput = Goodput(started, 0.0, dict.fromkeys(OVERHEADS, 0.0))
        for row in read_json_lines(folder.metrics, _has_times, skip_bad=True).rows:
            goodput.add(row["step_s"], {kind: row[f"{kind}_s"] for kind in OVERHEADS})
        return goodput

    def add(self, step_s: float, overheads_s: Mapping[str, float]) -> None:
        """Add the times of one step.

        Args:
            step_s: seconds of the step, including its wait for data and no other overhead.
            overheads_s: seconds of each of OVERHEADS.
        """
        self.compute_s += step_s - overheads_s["data"]
        for kind, seconds in overheads_s.items():
            self.overheads_s[kind] += seconds

    def shares(self, now: float) -> dict[str, float]:
        """Return the fractions of the wall time until `now`, whose sum is 1.

        They are `compute` (the goodput), each of OVERHEADS, and `restart`, the remainder: time in the queue,
        starting up, and in steps that were lost.
        """
        wall_s = max(now - self.started, 1e-9)
        shares = {"compute": self.compute_s / wall_s}
        shares |= {kind: seconds / wall_s for kind, seconds in self.overheads_s.items()}
        return shares | {"restart": max(1 - sum(shares.values()), 0.0)}


@dataclass(frozen=True)
class MfuCounter:
    """Computes the model FLOPs utilisation (MFU) from the throughput."""

    flops_per_clip: float
    """Floating-point operations per clip and training step: three times the forward pass, one for it and two
    for the backward pass. Recomputed activations do not count, and frozen layers count like trained ones."""
    peak_flops: float
    """Peak FLOP/s in bfloat16 of all ranks together."""

    def mfu(self, clips_per_s: float) -> float:
        """Return the MFU (PaLM, arXiv 2204.02311, appendix B): achieved over peak FLOP/s.

        Args:
            clips_per_s: throughput of all ranks together.
        """
        return self.flops_per_clip * clips_per_s / self.peak_flops


def device_peak_flops(device: torch.device) -> float | None:
    """Return the peak FLOP/s of a GPU in bfloat16; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


@torch.no_grad()
def unet_forward_flops(config: UNetConfig, num_frames: int, height: int, width: int, num_tokens: int) -> int:
    """Count the floating-point operations of the forward pass of one clip, on the meta device.

    torch's FlopCounterMode counts matrix products and convolutions; a multiplication and an addition are two
    operations.

    Args:
        height: height of a frame in pixels.
        width: width of a frame in pixels.
        num_tokens: number of context tokens.
    """
    with torch.device("meta"):
        unet = UNet(config)
        size = (height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
        inputs = (
            torch.empty(1, num_frames, config.in_channels, *size),
            torch.empty(1),
            torch.empty(1, num_tokens, config.context_width),
            torch.empty(1, config.num_scalars),
        )
    with FlopCounterMode(display=False) as counter:
        unet(*inputs)
    return counter.get_total_flops()


def _has_times(row: dict[str, Any]) -> bool:
    return all(isinstance(row.get(f"{name}_s"), float | int) for name in ("step", *OVERHEADS))


def peak_memory_gib() -> float:
    """Return the peak memory of this rank so far, in GiB.

    On a GPU it is the peak of tensors allocated by torch, without the allocator's cache and without what
    other libraries such as NCCL allocate. On a CPU it is the peak resident set size of the process.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
