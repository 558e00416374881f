"""Why a step lies out of the guard's bounds: its data, or a machine that computes wrongly.

The step is computed once more, from the same clips, noise and weights. A computation that comes out the same
is one of bad clips, or of bad weights. One that does not is one of failing hardware.

"The same" is not bitwise: on GPUs some kernels add in an order that changes (atomics), so the last bits of a
healthy one differ too. Two computations differ where one has a number that is not finite and the other has
not, or where they lie further apart than guard.recompute_tolerance, a share of the larger one.

Each rank computes its losses alone, so that a wrong one names its rank, and the rank's host. The norm of the
gradient is of all ranks, and names none; `LocalNorm` keeps each rank's own, once it has been needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean


@dataclass(frozen=True)
class Recomputation:
    """What one rank computed of a step, the first and the second time."""

    rank: int
    host: str
    clips: tuple[str, ...]
    losses: tuple[tuple[float, ...], tuple[float, ...]]
    """Of each clip."""
    norms: tuple[float, float] | None = None
    """Of the rank's own gradient; None where it is not known."""

    def difference(self, tolerance: float) -> str:
        """How the two differ, in words; "" where they are the same."""
        if differ(*self.losses, tolerance):
            return f"computed a loss of {_show(*map(fmean, self.losses))}, from the same clips"
        if self.norms is not None and differ(self.norms[:1], self.norms[1:], tolerance):
            return f"computed a gradient of norm {_show(*self.norms)}, from the same clips"
        return ""


@dataclass(frozen=True)
class FaultCause:
    """What the second computation of a step says of the first, the same on all ranks."""

    hardware: bool
    message: str
    nodes: dict[str, str] = field(default_factory=dict)
    """The hosts that computed wrongly, and what; empty where none can be told from the others."""


def find_cause(ranks: Sequence[Recomputation], norms: tuple[float, float], tolerance: float) -> FaultCause:
    """Compare two computations of a step.

    Args:
        ranks: every rank's.
        norms: of the gradient over all ranks.
        tolerance: guard.recompute_tolerance.
    """
    wrong = [(it, words) for it in ranks if (words := it.difference(tolerance))]
    hosts = {it.host for it in ranks}
    if not wrong and not differ(norms[:1], norms[1:], tolerance):
        return FaultCause(False, "; ".join(["computed again it comes out the same", *_worst_clips(ranks)]))
    if not wrong:
        words = f"computed again its gradient has norm {norms[1]:.4g}, and every rank has the same loss"
        if len(hosts) == 1:
            host, *_ = hosts
            return FaultCause(
                True, f"{words}, on {host}", {host: f"computed a gradient of norm {_show(*norms)}"}
            )
        return FaultCause(True, f"{words}: no node can be told from the others")
    words = "; ".join(f"rank {it.rank} on {it.host} {difference}" for it, difference in wrong)
    if len({it.host for it, _ in wrong}) == len(hosts) > 1:
        # What they share may be wrong: the network, or the part of the weights that one has sent to all.
        return FaultCause(True, f"{words}: no node can be told from the others")
    nodes: dict[str, str] = {}
    for it, difference in wrong:
        told = f"{difference} (rank {it.rank})"
        nodes[it.host] = f"{nodes[it.host]}, and {told}" if it.host in nodes else told
    return FaultCause(True, words, nodes)


def differ(first: Sequence[float], second: Sequence[float], tolerance: float) -> bool:
    """Whether two computations of the same numbers differ by more than `tolerance`, a share of the larger."""
    pairs = list(zip(first, second, strict=True))
    if any(math.isfinite(a) != math.isfinite(b) for a, b in pairs):
        return True
    finite = [(a, b) for a, b in pairs if math.isfinite(a)]
    size = max(math.fsum(abs(a) for a, _ in finite), math.fsum(abs(b) for _, b in finite))
    return math.fsum(abs(a - b) for a, b in finite) > tolerance * size


def _worst_clips(ranks: Sequence[Recomputation]) -> list[str]:
    """Which clips stand out, in words: those without a finite loss, else the one of the highest. With their
    ranks: a GPU that is always wrong in the same way shows as bad clips of one rank."""
    losses = [
        (f"{clip} (rank {it.rank} on {it.host})", loss)
        for it in ranks
        for clip, loss in zip(it.clips, it.losses[1], strict=True)
    ]
    if bad := [clip for clip, loss in losses if not math.isfinite(loss)]:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        return [f"no finite loss has {', '.join(bad[:5])}{more}"]
    clip, loss = max(losses, key=lambda pair: pair[1])
    return [f"the highest loss, {loss:.4g}, is that of {clip}"]


def _show(first: float, second: float) -> str:
    return f"{first:.4g}, then {second:.4g}"
