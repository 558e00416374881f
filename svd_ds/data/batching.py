"""Division of the global batch into micro-batches: the one place where it is decided.

    batch.size = ranks x micro-batches a rank x clips a micro-batch

The order of the samples (schedule.py) and the clips of a step do not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from svd_ds.settings import Settings, number

AUTO = "auto"
"""Value of batch.micro: the largest micro-batch that fits, by the plan (svd_ds.plan.auto)."""


@dataclass(frozen=True)
class BatchSplit:
    """Division of the global batch among the ranks."""

    size: int
    """Clips of an optimiser step over all ranks."""
    world: int
    """Number of ranks."""
    micro: tuple[int, ...]
    """Clips a rank processes at once, for each bucket."""

    def num_micro_batches(self, bucket: int) -> int:
        """Return the number of micro-batches that a rank processes in a step of `bucket`."""
        return self.size // (self.world * self.micro[bucket])


@dataclass(frozen=True)
class BatchConfig(Settings, section="batch"):
    """Batch size and micro-batch size."""

    # A million clips a step: its divisors are searched one by one, and the largest published batch is 1536.
    size: int = number(8, ge=1, le=2**20)
    """Clips in an optimiser step, over all ranks and micro-batches: the paper's batch size."""
    micro: int | str | None = number(None, ge=1, le=2**20, words=(AUTO,))
    """Clips a rank processes at once; null processes its whole share. auto: as many as fit the memory of the
    rank, by the plan of tools/plan.py; the start of the run prints the number. Not used with data.buckets,
    which has a size for each bucket."""

    def split(self, world: int, buckets: Mapping[str, int] | None = None) -> BatchSplit:
        """Divide the batch among `world` ranks.

        Args:
            world: number of ranks.
            buckets: data.buckets, shape -> clips a rank processes at once; empty or None without buckets.

        Raises:
            ValueError: the batch cannot be split over the ranks, or a rank's share into micro-batches; the
                message has the nearest numbers that are possible.
        """
        share = self.share(world)
        micro_sizes = {f"data.buckets.{name}": micro for name, micro in (buckets or {}).items()}
        if not micro_sizes:
            assert not isinstance(self.micro, str), "batch.micro=auto is resolved before the batch is divided"
            micro_sizes = {"batch.micro": self.micro or share}
        for key, micro in micro_sizes.items():
            if share % micro:
                raise ValueError(
                    f"{key} {micro} does not divide the {share} clips that each of {world} ranks has of "
                    f"batch.size {self.size}; choose {_nearest_divisors(share, micro)}"
                )
        return BatchSplit(self.size, world, tuple(micro_sizes.values()))

    def share(self, world: int) -> int:
        """Return the clips of a step that each of `world` ranks processes.

        Raises:
            ValueError: the batch cannot be split over the ranks.
        """
        if self.size % world:
            raise ValueError(
                f"batch.size {self.size} cannot be split over {world} ranks; start "
                f"{_nearest_divisors(self.size, world)}"
            )
        return self.size // world


def divisors(total: int) -> list[int]:
    """Return the divisors of `total`, from 1 to itself."""
    return [n for n in range(1, total + 1) if total % n == 0]


def _nearest_divisors(total: int, target: int) -> str:
    """Return the divisors of `total` next below and next above `target`, as text."""
    possible = divisors(total)
    below = [n for n in possible if n < target][-1:]
    above = [n for n in possible if n > target][:1]
    return " or ".join(str(n) for n in below + above)
