"""Cause of a step that is out of the guard's bounds: its data, or failing hardware.

The step is computed again, from the same clips, noise and weights. If both computations give the same
numbers, the clips or the weights are bad; if not, the hardware fails.

"The same" is not bitwise: some GPU kernels add in varying order (atomics), so the last bits differ on healthy
hardware too. Two computations differ if a number is finite in only one of them, or if their relative
difference is above guard.recompute_tolerance.

Each rank computes its losses alone, so a wrong loss identifies the rank and its host. The gradient norm is
computed over all ranks and identifies no rank; after the first hardware fault `LocalNorm` records the norm of
each rank's own gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean


@dataclass(frozen=True)
class Recomputation:
    """Numbers of one rank from the first and the second computation of a step."""

    rank: int
    host: str
    clips: tuple[str, ...]
    """Ids of the rank's clips."""
    losses: tuple[tuple[float, ...], tuple[float, ...]]
    """Loss of each clip, in the first and in the second computation."""
    norms: tuple[float, float] | None = None
    """Norm of the rank's own gradient in both computations; None if it was not recorded."""

    def describe_difference(self, tolerance: float) -> str:
        """Return a sentence about how the computations differ, "" if they are the same."""
        if is_different(*self.losses, tolerance):
            return f"computed a loss of {_show(*map(fmean, self.losses))}, from the same clips"
        if self.norms is not None and is_different(self.norms[:1], self.norms[1:], tolerance):
            return f"computed a gradient of norm {_show(*self.norms)}, from the same clips"
        return ""


@dataclass(frozen=True)
class FaultCause:
    """Result of comparing two computations of a step, the same on all ranks."""

    hardware: bool
    """True if the computations differ."""
    message: str
    nodes: dict[str, str] = field(default_factory=dict)
    """Failing host -> description of its wrong numbers; empty if the failing host cannot be identified."""


def find_cause(ranks: Sequence[Recomputation], norms: tuple[float, float], tolerance: float) -> FaultCause:
    """Compare two computations of a step.

    Args:
        ranks: numbers of every rank.
        norms: gradient norm over all ranks, in the first and in the second computation.
        tolerance: guard.recompute_tolerance.
    """
    wrong = [(entry, text) for entry in ranks if (text := entry.describe_difference(tolerance))]
    hosts = {entry.host for entry in ranks}
    if not wrong and not is_different(norms[:1], norms[1:], tolerance):
        return FaultCause(
            False, "; ".join(["computing it again gives the same numbers", *_worst_clips(ranks)])
        )
    if not wrong:
        message = (
            f"computing it again gives a gradient norm of {norms[1]:.4g} and the same loss on every rank"
        )
        if len(hosts) == 1:
            host, *_ = hosts
            return FaultCause(
                True, f"{message}, on {host}", {host: f"computed a gradient of norm {_show(*norms)}"}
            )
        return FaultCause(True, f"{message}: the failing node cannot be identified")
    message = "; ".join(f"rank {entry.rank} on {entry.host} {text}" for entry, text in wrong)
    if len({entry.host for entry, _ in wrong}) == len(hosts) > 1:
        # The cause may be something that all nodes share: the network, or a shard that one node has sent.
        return FaultCause(True, f"{message}: the failing node cannot be identified")
    nodes: dict[str, str] = {}
    for entry, text in wrong:
        fault = f"{text} (rank {entry.rank})"
        nodes[entry.host] = f"{nodes[entry.host]}, and {fault}" if entry.host in nodes else fault
    return FaultCause(True, message, nodes)


def is_different(first: Sequence[float], second: Sequence[float], tolerance: float) -> bool:
    """Return True if two computations of the same numbers differ by more than a relative tolerance."""
    pairs = list(zip(first, second, strict=True))
    if any(math.isfinite(a) != math.isfinite(b) for a, b in pairs):
        return True
    finite = [(a, b) for a, b in pairs if math.isfinite(a)]
    size = max(math.fsum(abs(a) for a, _ in finite), math.fsum(abs(b) for _, b in finite))
    return math.fsum(abs(a - b) for a, b in finite) > tolerance * size


def _worst_clips(ranks: Sequence[Recomputation]) -> list[str]:
    """Return a sentence about the clips whose loss is not finite, else about the clip with the highest loss.

    It names their ranks: a GPU that always computes the same wrong number shows as bad clips of one rank.
    """
    losses = [
        (f"{clip} (rank {entry.rank} on {entry.host})", loss)
        for entry in ranks
        for clip, loss in zip(entry.clips, entry.losses[1], strict=True)
    ]
    if bad := [clip for clip, loss in losses if not math.isfinite(loss)]:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        return [f"the loss is not finite for {', '.join(bad[:5])}{more}"]
    clip, loss = max(losses, key=lambda pair: pair[1])
    return [f"the highest loss is {loss:.4g}, of {clip}"]


def _show(first: float, second: float) -> str:
    return f"{first:.4g}, then {second:.4g}"
