"""Profile of one training step: memory as a function of the micro-batch, and operations. Plain data.

This module imports neither torch nor other parts of svd_ds, so that planning commands start quickly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

KINDS = ("matmul", "conv", "attention", "rest")
"""Kinds of operations: matrix products, convolutions, attention kernels, and all that only move bytes."""
PHASES = ("encoders", "forward", "backward", "optimiser")
"""Phases of a step: VAE and CLIP; the network; its backward pass with the recomputation; AdamW and EMA."""


@dataclass(frozen=True)
class Amount:
    """Bytes as a function of the micro-batch m: constant + m * per_clip + min(chunk, m * frames) * per_frame.

    The last term is the activations of the autoencoder, which encodes `chunk` frames at a time.
    """

    constant: float = 0.0
    per_clip: float = 0.0
    per_frame: float = 0.0
    """Bytes for each frame that the autoencoder encodes at once."""
    frames: int = 0
    """Frames of a clip that are encoded together."""

    def at(self, micro_batch: int, chunk: int) -> float:
        """Return the bytes at a micro-batch size, where `chunk` is frozen.chunk."""
        encoded = min(chunk, micro_batch * self.frames)
        return self.constant + micro_batch * self.per_clip + encoded * self.per_frame


@dataclass(frozen=True)
class MemoryPoint:
    """Tensors that are in memory at one moment of the step."""

    phase: str
    """One of PHASES."""
    module: str
    """Block of the network or part of the encoders that runs."""
    total: Amount
    parts: dict[str, Amount]
    """Summands of `total`: gathered weights, gradients, activations of a part of the network, ..."""


@dataclass(frozen=True)
class Operation:
    """Equal operations of a phase."""

    kind: str
    """One of KINDS."""
    count: int
    """Number of launches for a micro-batch, or for a chunk of frames that the autoencoder encodes at once."""
    flops: float
    """Floating-point operations of one launch, for each clip of the micro-batch or frame of the chunk."""
    bytes: float
    """Bytes that one launch reads and writes, for each clip or frame."""
    constant_bytes: float
    """Bytes that it reads and writes at any micro-batch size: weights and their gradients."""
    frames: int
    """Frames of each clip that the autoencoder encodes with this operation; 0: an operation on clips."""


@dataclass(frozen=True)
class PhaseCost:
    """Operations of one phase, forward and recomputation included."""

    operations: tuple[Operation, ...]
    launches: int
    """Launches at the micro-batch size of the profile."""
    flops: dict[str, float]
    """Kind -> floating-point operations for one clip."""
    clip_bytes: float
    """Bytes moved for each clip."""
    constant_bytes: float
    """Bytes moved at any micro-batch size."""


@dataclass(frozen=True)
class StepProfile:
    """One training step of a network with a recompute policy, ZeRO-3 and optimiser shards apart."""

    policy: str
    """Recompute policy."""
    parameters: int
    trained_parameters: int
    tensors: int
    """Number of parameters as tensors."""
    trained_tensors: int
    blocks: dict[str, int]
    """Unit that ZeRO-3 gathers together -> its number of elements."""
    compute_bytes: int
    """Bytes of an element in the compute precision."""
    frozen_bytes: int
    """Bytes of the frozen networks: autoencoder, CLIP encoder, perceptual network."""
    extra_bytes: int
    """Bytes of the discriminator with its gradients and moments."""
    chunk: int
    """frozen.chunk."""
    kept: Amount
    """Bytes between forward and backward pass."""
    points: tuple[MemoryPoint, ...]
    """Moments of which one is the peak at any micro-batch size up to 1024; of each phase alone, too."""
    phases: dict[str, PhaseCost]
    """Costs by phase. Those of the optimiser are for all elements: a rank has its share of them."""
    host_reads: tuple[str, ...]
    """Places (file:line) where the host waits for the device: it reads a number, or copies to the device
    without non_blocking. One is expected, the read of losses and norm."""
    device_errors: tuple[str, ...]
    """Operations on tensors of different devices, with their locations."""
    exact: bool
    """False if it was made without a C++ compiler: layouts are then a CPU's."""

    @property
    def largest_block(self) -> int:
        """Number of elements of the largest unit that ZeRO-3 gathers together."""
        return max(self.blocks.values())

    def peak(self, micro_batch: int, phase: str | None = None) -> tuple[float, MemoryPoint]:
        """Return the largest bytes of the step's own tensors at a micro-batch size, and that moment.

        Args:
            micro_batch: clips that a rank processes at once.
            phase: one of PHASES; None: of the whole step.
        """
        moments = [point for point in self.points if phase in (None, point.phase)]
        best = max(moments, key=lambda point: point.total.at(micro_batch, self.chunk))
        return best.total.at(micro_batch, self.chunk), best

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> StepProfile:
        """Restore what `as_dict` returned."""
        return StepProfile(
            **fields
            | {
                "kept": Amount(**fields["kept"]),
                "points": tuple(_memory_point(point) for point in fields["points"]),
                "phases": {name: _phase_cost(cost) for name, cost in fields["phases"].items()},
                "host_reads": tuple(fields["host_reads"]),
                "device_errors": tuple(fields["device_errors"]),
            }
        )


@dataclass(frozen=True)
class ProfileRequest:
    """Request for the profile of one step."""

    config: dict[str, Any]
    """Resolved settings, `RunConfig.as_dict()`."""
    policy: str
    """Recompute policy, in place of the config's."""
    precision: str = "bf16"
    """bf16 or fp32."""
    device: str = "cuda"
    """cuda or cpu: the device whose kernels the step takes."""
    clips: int = 1
    """Micro-batch size of the run; the profile holds for any size."""


def sum_amounts(amounts: Iterable[Amount]) -> Amount:
    """Add amounts that encode the same number of frames."""
    amounts = list(amounts)
    return Amount(
        sum(amount.constant for amount in amounts),
        sum(amount.per_clip for amount in amounts),
        sum(amount.per_frame for amount in amounts),
        max((amount.frames for amount in amounts), default=0),
    )


def _memory_point(fields: dict[str, Any]) -> MemoryPoint:
    parts = {name: Amount(**part) for name, part in fields["parts"].items()}
    return MemoryPoint(fields["phase"], fields["module"], Amount(**fields["total"]), parts)


def _phase_cost(fields: dict[str, Any]) -> PhaseCost:
    return PhaseCost(
        **fields | {"operations": tuple(Operation(**operation) for operation in fields["operations"])}
    )
