"""Where the whole run stands in its data: two plain values, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cursor:
    """A point between two global steps. `Cursor(**asdict(cursor))` is its round trip through json."""

    next_ordinal: int
    """Samples that all ranks together have consumed since the run began: the next ordinal."""
    fingerprint: str
    """Names the set of samples that the position counts; see `Index.fingerprint`."""

    def check(self, fingerprint: str, where: str) -> None:
        """Raises ValueError unless `fingerprint`, of the data at `where`, is the one that was read so far."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the run's {self.next_ordinal} samples so far are of a set with fingerprint {self.fingerprint}, "
                f"and the clips in {where} that are long and large enough have {fingerprint}"
            )
