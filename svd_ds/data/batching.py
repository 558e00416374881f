"""Division of the global batch into micro-batches: the one place where it is decided.

    batch.size = ranks x micro-batches a rank x clips a micro-batch

The order of the samples (schedule.py) and the clips of a step do not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from svd_ds.settings import Settings, number


@dataclass(frozen=True)
class BatchSplit:
    """The global batch as the ranks share it."""

    size: int
    """Clips of an optimiser step over all ranks."""
    world: int
    """Number of ranks."""
    micro: tuple[int, ...]
    """Clips a rank processes at once, for each bucket."""

    def num_micro_batches(self, bucket: int) -> int:
        """Micro-batches a rank processes in a step of `bucket`."""
        return self.size // (self.world * self.micro[bucket])


@dataclass(frozen=True)
class BatchConfig(Settings, section="batch"):
    """Batch size and micro-batch size."""

    # A million clips a step: its divisors are searched one by one, and the largest published batch is 1536.
    size: int = number(8, ge=1, le=2**20)
    """Clips in an optimiser step, over all ranks and micro-batches: the paper's batch size."""
    micro: int | None = number(None, ge=1, le=2**20)
    """Clips a rank processes at once; null processes its whole share. Buckets have sizes of their own
    (data.buckets)."""

    def split(self, world: int, buckets: Mapping[str, int] | None = None) -> BatchSplit:
        """Divide the batch among `world` ranks.

        Args:
            buckets: data.buckets, shape -> clips a rank processes at once; empty or None without buckets.

        Raises:
            ValueError: a micro-batch size does not divide a rank's share; the message has the nearest sizes
                that do.
        """
        if self.size % world:
            raise ValueError(
                f"batch.size {self.size} cannot be split over {world} ranks; start "
                f"{_nearest_divisors(self.size, world)}"
            )
        share = self.size // world
        wanted = {f"data.buckets.{name}": micro for name, micro in (buckets or {}).items()}
        wanted = wanted or {"batch.micro": self.micro or share}
        for key, micro in wanted.items():
            if share % micro:
                raise ValueError(
                    f"{key} {micro} does not divide the {share} clips that each of {world} ranks has of "
                    f"batch.size {self.size}; choose {_nearest_divisors(share, micro)}"
                )
        return BatchSplit(self.size, world, tuple(wanted.values()))


def _nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of `number` next below and next above `wanted`, as text."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below = [n for n in divisors if n < wanted][-1:]
    above = [n for n in divisors if n > wanted][:1]
    return " or ".join(str(n) for n in below + above)
