"""What a run makes of its machine: wall time, memory, arithmetic."""

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
"""What a rank does besides computing steps."""
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "A800": 312e12, "L40S": 362e12}
"""Dense bfloat16 operations a second by the vendor's data sheet, of the form with the largest: a part of the
device's name -> peak. A PCIe card reaches less of it."""


class StageTimer:
    """Times a rank's waits. `with clock("data"): ...` adds to one of WAITS."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(OVERHEADS, 0.0)

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[kind] += time.perf_counter() - started

    def lap(self) -> dict[str, float]:
        """Seconds of each kind since the last lap."""
        seconds, self._seconds = self._seconds, dict.fromkeys(OVERHEADS, 0.0)
        return seconds


@dataclass
class Goodput:
    """How the wall time since a run was first started divides, over all its lives."""

    started: float
    """Seconds since the epoch."""
    compute_s: float
    """In the steps that count: one that was lost and done again counts once."""
    overheads_s: dict[str, float]

    @staticmethod
    def of(folder: RunFolder) -> Goodput:
        """As far as the folder's files tell; of a run without a life until now, it starts now."""
        restarts = read_acquired_restarts(folder.checkpoints)
        started = restarts[0].time if restarts else time.time()
        goodput = Goodput(started, 0.0, dict.fromkeys(OVERHEADS, 0.0))
        for row in read_json_lines(folder.metrics, _has_times, skip_bad=True).rows:
            goodput.add(row["step_s"], {kind: row[f"{kind}_s"] for kind in OVERHEADS})
        return goodput

    def add(self, step_s: float, overheads_s: Mapping[str, float]) -> None:
        """One more step. `step_s` holds the wait for data and none of the others."""
        self.compute_s += step_s - overheads_s["data"]
        for kind, seconds in overheads_s.items():
            self.overheads_s[kind] += seconds

    def shares(self, now: float) -> dict[str, float]:
        """Shares of the wall time until `now`, 1 in all: compute, each wait, and restart, which is the rest:
        queues, starts, steps that were lost."""
        wall_s = max(now - self.started, 1e-9)
        shares = {"compute": self.compute_s / wall_s}
        shares |= {kind: seconds / wall_s for kind, seconds in self.overheads_s.items()}
        return shares | {"restart": max(1 - sum(shares.values()), 0.0)}


@dataclass(frozen=True)
class MfuCounter:
    """What the ranks' arithmetic is measured by."""

    clip_flops: float
    """Of a step: three times a forward pass, whatever is frozen or recomputed."""
    peak_flops: float
    """Of all ranks together, a second."""

    def mfu(self, clips_per_s: float) -> float:
        """Model FLOPs utilisation (arXiv 2204.02311, appendix B)."""
        return self.clip_flops * clips_per_s / self.peak_flops


def peak_of(device: torch.device) -> float | None:
    """A GPU's bfloat16 operations a second; None for a CPU or a GPU that is not in PEAKS."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


@torch.no_grad()
def unet_forward_flops(config: UNetConfig, num_frames: int, height: int, width: int, num_tokens: int) -> int:
    """Operations of one clip's forward pass, counted on the meta device; height and width in pixels.

    A multiplication and its sum are two.
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
    """The most that this rank held so far: on its GPU where it has one, else in the host's memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
